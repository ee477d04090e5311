"""Stored averages: reconstruction through the files and the command line, and what a run leaves when it goes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.errors import CheckpointError
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job
from bessemer.systems.contract import System
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, save_snapshot
from bessemer.training.checkpoint_files import kimg_name
from bessemer.training.ema_store import reconstruct
from bessemer.training.power_function import exponent

FIELDS = {"generator_width": 2, "discriminator_width": 2, "latent_dim": 8, "shared_dim": 3, "standing_batch": 2}
STEP, STEPS = 250, 64


def _system() -> System:
    system = build("biggan", "tiny32", FIELDS)
    system.init_weights(torch.Generator().manual_seed(1))
    system.prepare_sampling(torch.arange(4), torch.Generator().manual_seed(2))
    return system


def _exact(trajectory: list[dict[str, Tensor]], sigma_rel: float, steps: int) -> dict[str, Tensor]:
    """The average by its definition, in float64."""
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (exponent(sigma_rel) + 1)
    masses = edges.diff().tolist()
    return {
        k: torch.stack([m * w[k].double() for m, w in zip(masses, trajectory, strict=False)]).sum(0)
        for k in trajectory[0]
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]], dict[str, Tensor]]:
    """A run directory with averages of a random walk of BigGAN's weights, stored every four steps."""
    path, system = tmp_path_factory.mktemp("runs") / "walk", _system()
    draws = torch.Generator().manual_seed(5)
    network = system.networks()["generator"]
    weights = {f"generator.{k}": p.detach().clone() for k, p in network.named_parameters()}
    buffers = {f"generator.{k}": b.clone() for k, b in network.named_buffers() if f"{k}" in network.state_dict()}
    trajectory = []
    for _ in range(STEPS):
        weights = {k: w + 0.02 * torch.randn(w.shape, generator=draws) for k, w in weights.items()}
        trajectory.append(weights)
    for steps in range(4, STEPS + 1, 4):
        nimg = steps * STEP
        for sigma_rel in (0.05, 0.1):
            tensors = {k: v.float() for k, v in _exact(trajectory, sigma_rel, steps).items()}
            tensors |= {k: b + steps for k, b in buffers.items()}
            config = system.config.model_dump(mode="json")
            info = SnapshotInfo(
                "biggan", config, nimg, {"sigma_rel": sigma_rel}, 0, "abc", list("0123456789"), [5] * 10
            )
            save_snapshot(path / "ema" / f"sigma-{sigma_rel:g}" / kimg_name(nimg), tensors, info)
    (path / "run.json").write_text("{}")
    job = {
        "name": "walk",
        "system": {"name": "biggan", "preset": "tiny32"},
        "data": {"path": "none"},
        "training": {"total_kimg": 16, "batch_size": 50, "slice_size": 50},
    }
    (path / "job.yaml").write_text(dump_job(JobSpec.model_validate(job)))
    return path, trajectory, buffers


@pytest.mark.parametrize(("sigma_rel", "steps"), [(0.07, STEPS), (0.15, STEPS), (0.07, 32)])
def test_files_reconstruct_the_exact_average(
    run: tuple[Path, list[dict[str, Tensor]], dict[str, Tensor]], sigma_rel: float, steps: int
) -> None:
    path, trajectory, buffers = run
    found = reconstruct(path / "ema", sigma_rel, steps * STEP)
    wanted, stored = _exact(trajectory, sigma_rel, steps), _exact(trajectory, 0.1, steps)
    assert found.tensors.keys() == wanted.keys() | buffers.keys()
    error = sum(float((found.tensors[k] - v).square().sum()) for k, v in wanted.items()) ** 0.5
    nearest = sum(float((stored[k] - v).square().sum()) for k, v in wanted.items()) ** 0.5
    assert error < 0.05 * nearest
    for name, value in buffers.items():  # of the moment, not averaged
        assert torch.equal(found.tensors[name], value + steps), name
    assert found.info.nimg == steps * STEP
    assert found.info.ema["reconstructed_from"] == steps // 2
    assert not found.skipped


def test_the_command_writes_a_snapshot_that_samples(
    run: tuple[Path, list[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    path, *_ = run
    words = ["ema", "reconstruct", str(path), "--sigma-rel", "0.07", "--out", str(tmp_path / "wide"), "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    system, info = load_snapshot(tmp_path / "wide")
    assert printed["weights_sha256"] == info.weights_sha256
    assert info.ema == {"sigma_rel": 0.07, "reconstructed_from": 32, "residual": printed["residual"]}
    images = system.sample(torch.arange(4), torch.Generator().manual_seed(0))
    assert images.isfinite().all()
    again = CliRunner().invoke(app, words, catch_exceptions=False)  # a snapshot may be replaced
    assert json.loads(again.stdout) == printed


def test_nothing_else_is_replaced(run: tuple[Path, list[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    words = ["ema", "reconstruct", str(run[0]), "--sigma-rel", "0.07", "--out", str(tmp_path / "mine")]
    done = CliRunner().invoke(app, words)
    assert "is no snapshot, so it is not replaced" in str(done.exception)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_moments_and_damage_are_named(
    run: tuple[Path, list[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"--at 7\.3: no average .* nearest moments are 7 and 8 kimg, of 16"):
        reconstruct(run[0] / "ema", 0.07, 7300)
    with pytest.raises(CheckpointError, match=r"holds no stored average; set ema\.profiles"):
        reconstruct(tmp_path, 0.07)
    shutil.copytree(run[0] / "ema", tmp_path / "ema")
    weights = tmp_path / "ema" / "sigma-0.05" / kimg_name(8000) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = reconstruct(tmp_path / "ema", 0.07)
    assert found.info.ema["reconstructed_from"] == 31
    assert len(found.skipped) == 1
    assert kimg_name(8000) in found.skipped[0]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (2, 2)])
def test_a_run_stores_its_profiles(
    launch: Callable[..., list[dict[str, Tensor]]], tmp_path: Path, stage: int, workers: int
) -> None:
    run = tmp_path / "run"
    states = launch(workers, stage, 6, "--run", run)
    stored = sorted(p.relative_to(run / "ema") for p in (run / "ema").glob("sigma-*/*"))
    names = [kimg_name(nimg) for nimg in (64, 128, 192)]
    assert stored == sorted(Path(f"sigma-{s}") / n for s in ("0.1", "0.25") for n in names)
    for sigma_rel in ("0.1", "0.25"):
        last = load_file(run / "ema" / f"sigma-{sigma_rel}" / names[-1] / "weights.safetensors")
        for name, value in last.items():
            assert torch.equal(value, states[0][f"ema.{sigma_rel}.{name}"]), name
    # Back to kimg 0.128: what was stored beyond is not of the way that the run takes from there.
    shutil.rmtree(run / "checkpoints" / kimg_name(192))
    launch(workers, stage, 4, "--run", run)
    assert sorted({p.name for p in (run / "ema").glob("sigma-*/*")}) == names[:2]
