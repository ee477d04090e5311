"""Every file in jobs/: what a team submits as it stands."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

from bessemer.evaluation.names import EXTRACTORS
from bessemer.spec.load import load_job
from bessemer.systems.contract import Clock, System
from bessemer.systems.registry import all_systems, build
from bessemer.training.checks import check_training
from bessemer.training.schedule import lr_factor

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
EACH = pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
CLASSES = {"digits": 10, "digits8": 10, "mnist": 10, "cifar10": 10, "moving-digits": 10, "plucked": 4, "vctk": 109}


def _packs(path: Path) -> dict[str, dict[str, str]]:
    """Data set -> source and options of the `bessemer data pack` that the file's head tells to run."""
    found = {}
    for line in re.findall(r"^#\s+bessemer data pack (.+)$", path.read_text(), re.MULTILINE):
        source, out, *options = shlex.split(line)
        found[out] = {"source": source, **dict(zip(options[::2], options[1::2], strict=True))}
    return found


@cache  # NVAE at 256 pixels takes seconds
def _system(path: Path) -> System:
    """The job's system with the shape of its data set, on the meta device."""
    job = load_job(path)
    facts = {}
    if (options := _packs(path).get(job.data.path)) is not None:
        grey = options["source"] == "digits" or options.get("--mode") == "L"
        if "--size" in options:  # else it is sound
            facts = {"resolution": int(options["--size"]), "channels": 1 if grey else 3}
        if "--length" in options:
            facts["frames" if "--size" in options else "samples"] = int(options["--length"])
        facts["classes"] = CLASSES.get(Path(job.data.path).name, 1000 if "imagenet" in job.data.path else 1)
    with torch.device("meta"):
        return build(job.system.name, job.system.preset, job.system.config, facts)


@EACH
def test_the_system_takes_the_job_and_its_data(path: Path) -> None:
    job = load_job(path)
    check_training(job.training, _system(path))
    assert job.name == path.stem or path.stem.startswith("quickstart")
    assert all("_" not in m or m == "bits_per_dim" or m.split("_")[1] in EXTRACTORS for m in job.evaluation.metrics)


@EACH
def test_the_head_says_how_to_make_the_data(path: Path) -> None:
    job = load_job(path)
    if job.name == "quickstart":  # which packs by itself
        return
    packs = _packs(path)
    assert job.data.path in packs, (
        f"{path.name}: a comment `#   bessemer data pack SOURCE {job.data.path} ...` is missing"
    )
    assert job.evaluation.held_out is None or job.evaluation.held_out in packs


@EACH
def test_averages_checkpoints_and_evaluations_fall_on_whole_iterations(path: Path) -> None:
    """Else each would come a little later than the file says."""
    job = load_job(path)
    images = job.training.batch_size * max(u.repeats for u in _system(path).updates(Clock(0, 0)))
    assert job.training.total_kimg * 1000 >= images
    assert job.checkpoint.every_kimg * 1000 >= images
    assert job.evaluation.every_kimg >= job.checkpoint.every_kimg or job.checkpoint.keep_best is None


def test_every_preset_of_a_paper_has_a_job() -> None:
    """Small presets are for tests and first runs; these are variants that a job can name."""
    variants = {
        ("biggan", "cifar100"), ("biggan", "res32"), ("biggan", "imagenet64"), ("biggan", "imagenet128-ch64"),
        ("biggan", "imagenet256-tfhub"), ("biggan", "imagenet512-tfhub"),
        ("biggan-deep", "deep64"), ("nvae", "tiny28"), ("sngan", "cifar10-projection"), ("sagan", "cifar10"),
        ("sagan", "imagenet128-attn64"), *(("stylegan2", f"auto{2**k}") for k in range(5, 11)),
    }  # fmt: skip
    used = {(job.system.name, job.system.preset) for job in map(load_job, JOBS)}
    flagships = ("biggan", "biggan-deep", "sngan", "sagan", "stylegan2", "nvae")
    presets = {(name, preset) for name in flagships for preset in all_systems()[name].presets}
    assert presets - used == variants


@pytest.mark.parametrize(
    ("stem", "images", "decay"),
    [("biggan-imagenet128", 4096, 0.9999), ("biggan-deep-imagenet512", 4096, 0.9999), ("biggan-cifar10", 200, 0.9999)],
)
def test_half_lives_are_the_papers_decay(stem: str, images: int, decay: float) -> None:
    job = load_job(ROOT / "jobs" / f"{stem}.yaml")
    assert 0.5 ** (images / (1000 * job.ema.half_life_kimg)) == pytest.approx(decay, rel=1e-7)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("biggan-*imagenet*.yaml")), ids=lambda path: path.stem)
def test_imagenet_batches_are_made_of_slices(path: Path) -> None:
    job = load_job(path)
    assert (job.training.batch_size, job.slices % job.resources.workers) == (2048, 0)
    assert job.slices > 1
    system = _system(path)
    assert [u.repeats for u in system.updates(Clock(0, 0))] == [2, 1]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("biggan-*imagenet*.yaml")), ids=lambda path: path.stem)
def test_learning_rates_of_biggan_are_the_papers(path: Path) -> None:
    """Appendix C: 5e-5 in G and 2e-4 in D, but 2.5e-5 in both networks of BigGAN-deep at 256 and 512 pixels."""
    rates = {name: optimizer.lr for name, optimizer in _system(path).optimizers().items()}
    large_and_deep = re.fullmatch(r"biggan-deep-imagenet(256|512)", path.stem)
    assert rates == dict(
        zip(("generator", "discriminator"), (2.5e-5, 2.5e-5) if large_and_deep else (5e-5, 2e-4), strict=True)
    )
    assert load_job(path).training.lr_schedule.decay == "none"


def test_the_rate_of_sngan_falls_in_the_last_50_000_of_450_000_steps() -> None:
    training = load_job(ROOT / "jobs" / "sngan-imagenet128.yaml").training
    images = 5 * training.batch_size  # of one step of the generator
    steps = [lr_factor(training, step * images) for step in (0, 400_000, 425_000, 450_000)]
    assert steps == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("data", "images", "epochs", "batch", "workers", "warmup_epochs", "mirror"),
    [
        ("mnist", 60_000, 400, 400, 2, 5, False),
        ("cifar10", 50_000, 400, 256, 8, 5, True),
        ("celeba64", 162_770, 90, 128, 8, 5, True),
        ("imagenet32", 1_281_147, 45, 576, 24, 1, True),
        ("celebahq256", 27_000, 300, 96, 24, 5, True),
        ("ffhq256", 63_000, 200, 96, 24, 5, True),
    ],
)
def test_nvae_trains_as_published(
    data: str, images: int, epochs: int, batch: int, workers: int, warmup_epochs: int, mirror: bool
) -> None:
    """Table 6 and the published commands; the rate falls along a cosine to 1e-4, and β rises over 30% of the run."""
    path = ROOT / "jobs" / f"nvae-{data}.yaml"
    job, config = load_job(path), _system(path).config
    training, schedule = job.training, job.training.lr_schedule
    assert (training.batch_size, job.resources.workers, job.data.mirror) == (batch, workers, mirror)
    assert training.total_kimg * 1000 == pytest.approx(epochs * images, abs=500)
    assert schedule.warmup_kimg * 1000 == pytest.approx(warmup_epochs * images, abs=500)
    assert (schedule.decay, schedule.decay_from_kimg) == ("cosine", None)
    assert config.lr * schedule.final == pytest.approx(1e-4)  # type: ignore[attr-defined]
    assert config.kl_warmup_kimg == pytest.approx(0.3 * training.total_kimg, rel=1e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stem", "kimg", "batch", "deviation", "lr", "gamma", "average", "rampup", "mirror"),
    [
        ("ffhq1024", 25_000, 32, 4, 0.002, 10, 10, None, True),
        ("lsunchurch256", 88_000, 32, 4, 0.002, 100, 10, None, False),
        ("ffhq256", 25_000, 64, 8, 0.0025, 1, 20, None, True),
        ("ada-afhqcat512", 25_000, 64, 8, 0.0025, 0.5, 20, None, True),
        ("ada-ffhq1024", 25_000, 32, 4, 0.002, 2, 10, None, True),
        ("cifar10", 100_000, 64, 32, 0.0025, 0.01, 500, 0.05, False),
        ("cifar10-conditional", 100_000, 64, 32, 0.0025, 0.01, 500, 0.05, False),
    ],
)
def test_stylegan2_trains_as_published(
    stem: str,
    kimg: int,
    batch: int,
    deviation: int,
    lr: float,
    gamma: float,
    average: float,
    rampup: float | None,
    mirror: bool,
) -> None:
    """The configurations of the authors' code; a worker's slice holds a whole group for the standard deviation."""
    path = ROOT / "jobs" / f"stylegan2-{stem}.yaml"
    job, config = load_job(path), _system(path).config
    training = job.training
    assert (training.total_kimg, training.batch_size, job.data.mirror) == (kimg, batch, mirror)
    assert (config.lr, config.r1_gamma, config.minibatch_group) == (lr, gamma, deviation)  # type: ignore[attr-defined]
    assert training.slice_size >= deviation
    assert (job.ema.half_life_kimg, job.ema.rampup) == (average, rampup)
