import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.data.packing.pack import pack
from bessemer.errors import (
    BessemerError,
    CheckpointError,
    DataError,
    EvaluationError,
    MachineError,
    RunError,
    SpecError,
)
from bessemer.evaluation.weights import WEIGHTS
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, save_snapshot
from bessemer.tracking.journal import protocol_key, read_journal


def invoke(*arguments: object) -> str:
    """Standard output of a command that succeeds; the error of one that does not is raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the untrained tiny BigGAN with two snapshots, on 40 flat images of two classes."""
    root = tmp_path_factory.mktemp("commands")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = root / "images" / ("bright" if i % 2 else "dark") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = rng.integers(128, 256) if i % 2 else rng.integers(0, 128)
        Image.fromarray(np.full((32, 32, 3), level, dtype=np.uint8)).save(path)
    manifest = pack(root / "images", root / "data")
    job = JobSpec.model_validate(
        {
            "name": "commands",
            "seed": 7,
            "system": {"name": "biggan", "preset": "tiny32"},
            "data": {"path": str(root / "data")},
            "training": {"total_kimg": 1, "batch_size": 8, "slice_size": 8},
            "evaluation": {"metrics": ["kid_efflite0"], "samples": 34, "truncation": 0.8},
        }
    )
    directory = RunDirectory.create(root / "runs", job)
    system = build("biggan", "tiny32", data=manifest.facts)
    for nimg in (0, 8000):
        system.init_weights(torch.Generator().manual_seed(nimg))
        tensors = {
            f"{name}.{key}": value
            for name in system.sampled_networks
            for key, value in system.networks()[name].state_dict().items()
        }
        info = SnapshotInfo(
            system="biggan",
            config=system.config.model_dump(mode="json"),
            nimg=nimg,
            ema={"half_life_kimg": 10.0},
            seed=7,
            data_hash=manifest.hash,
            class_names=list(manifest.classes),
            class_counts=list(manifest.class_counts),
        )
        save_snapshot(directory.path / "snapshots" / f"kimg-{nimg / 1000:010.3f}", tensors, info)
    return directory.path


def test_evaluate_takes_the_jobs_settings_and_writes_the_journal(run: Path) -> None:
    [record] = json.loads(invoke("evaluate", run, "--json"))
    expected = {"metric": "kid_efflite0", "samples": 34, "reference_samples": 34, "seed": 7, "truncation": 0.8}
    assert {key: record[key] for key in expected} == expected
    assert record["nimg"] == 8000
    assert (
        record["weights_sha256"]
        == json.loads((run / "snapshots/kimg-000008.000/snapshot.json").read_text())["weights_sha256"]
    )
    kept = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "evaluation"]
    assert [{key: r[key] for key in record} for r in kept] == [record]


def test_speeds_name_their_hardware_and_are_journaled(run: Path) -> None:
    records = json.loads(invoke("evaluate", run, "-m", "samples_per_s,latency_ms", "--device", "cpu", "--json"))
    found = {r["metric"]: r for r in records}
    assert found["samples_per_s"]["samples"] == 20 * 50
    assert found["latency_ms"]["samples"] == 20
    assert found["samples_per_s"]["higher_is_better"]
    assert not found["latency_ms"]["higher_is_better"]
    # A batch takes at least as long as one image, and one at most as long as a batch of 50.
    assert 1 / 50 <= found["samples_per_s"]["value"] * found["latency_ms"]["value"] / 1000 <= 50
    assert f"torch {torch.__version__}" in found["latency_ms"]["hardware"]
    kept = [r for r in read_journal(run / "journal.jsonl") if r.get("metric") in found]
    assert [r["hardware"] for r in kept] == [records[0]["hardware"]] * 2
    elsewhere = {**kept[0], "hardware": "another machine"}
    assert protocol_key(elsewhere) != protocol_key(kept[0])


def test_evaluate_takes_other_settings_and_prints_a_table(run: Path) -> None:
    text = invoke(
        "evaluate",
        run,
        "-m",
        "fd_efflite0,kid_efflite0",
        "-n",
        33,
        "--truncation",
        0.5,
        "--snapshot",
        "kimg-000000.000",
    )
    header, *rows = text.splitlines()
    assert header.split()[:2] == ["metric", "value"]
    assert [row.split()[0] for row in rows] == ["fd_efflite0", "kid_efflite0"]
    kept = [r for r in read_journal(run / "journal.jsonl") if r.get("samples") == 33]
    assert [(r["metric"], r["nimg"], r["truncation"]) for r in kept] == [
        ("fd_efflite0", 0, 0.5),
        ("kid_efflite0", 0, 0.5),
    ]


def test_a_snapshot_is_evaluated_as_its_run_is(run: Path, tmp_path: Path) -> None:
    [of_run] = json.loads(invoke("evaluate", run, "-m", "kid_pixels", "-n", 40, "--json"))
    [of_snapshot] = json.loads(
        invoke("evaluate", run / "snapshots/kimg-000008.000", "-m", "kid_pixels", "-n", 40, "--json")
    )
    lone = tmp_path / "exported"
    shutil.copytree(run / "snapshots/kimg-000008.000", lone)
    data = run.parent.parent / "data"
    [of_lone] = json.loads(
        invoke("evaluate", lone, "--against", data, "-m", "kid_pixels", "-n", 40, "--truncation", 0.8, "--json")
    )
    for record in (of_run, of_snapshot, of_lone):
        record.pop("seconds")
    assert of_run == of_snapshot == of_lone


def test_images_of_others_are_evaluated(run: Path, tmp_path: Path) -> None:
    images, data = run.parent.parent / "images", run.parent.parent / "data"
    metrics = "kid_pixels,coverage_pixels,memorised_pixels,intrafd_pixels"
    records = json.loads(invoke("evaluate", images, "--against", data, "-m", metrics, "--json"))
    values = {r["metric"]: r["value"] for r in records}
    assert values["memorised_pixels"] == 1.0
    assert values["intrafd_pixels"] == pytest.approx(0, abs=1e-6)
    assert {r["weights"] for r in records} == {"images"}
    assert records[3]["details"]["classes"].keys() == {"bright", "dark"}
    text = invoke("compare-sets", images / "dark", images / "bright", "-m", "kid_pixels", "-n", 10)
    header, row = text.splitlines()
    assert header.split()[:5] == ["metric", "value", "standard", "error", "better"]
    assert row.split()[:1] + row.split()[3:6] == ["kid_pixels", "lower", "10", "20"]
    assert float(row.split()[1]) > 1


def test_pairs_of_the_memorisation_check_are_drawn(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.png"
    invoke("evaluate", run, "-m", "memorised_pixels", "-n", 20, "--figure", out)
    with Image.open(out) as image:
        assert image.size == (8 * 32, 4 * 32)


def test_extractors_say_what_is_missing() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("extractors", "list", "--json"))}
    assert rows["efflite0"]["dimension"] == 1280
    assert rows["pixels"]["missing"] is None
    assert "BESSEMER_DINOV2" in rows["dinov2"]["missing"]
    text = invoke("extractors", "list")
    assert re.search(r"^clip +- +missing", text, re.MULTILINE)


def test_weights_are_fetched_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(WEIGHTS, "lpips", replace(WEIGHTS["lpips"], sha256=digest))
    source = (tmp_path / "vgg.pth").as_uri()
    found = json.loads(invoke("extractors", "get", "lpips", "--source", source, "--json"))
    assert (found["name"], found["sha256"]) == ("lpips", digest)
    assert Path(found["file"]).read_bytes() == b"weights"
    assert invoke("extractors", "get", "lpips", "--source", source) == found["file"] + "\n"


def test_sample_draws_the_same_latents_again_and_other_weights_differently(run: Path, tmp_path: Path) -> None:
    for name, options in {
        "new": (),
        "again": (),
        "old": ("--snapshot", run / "snapshots" / "kimg-000000.000"),
        "seed": ("--seed", 1),
        "tame": ("--truncation", 0.1),
        "bright": ("--class", "bright"),
    }.items():
        out = tmp_path / f"{name}.png"
        text = invoke("sample", run, "--out", out, "--rows", 2, *options)
        assert text == f"{out}: 2 x 2 images at {0 if name == 'old' else 8} kimg\n"
    facts = json.loads(invoke("sample", run, "--out", tmp_path / "new.png", "--rows", 2, "--json"))
    assert (facts["file"], facts["nimg"], facts["rows"]) == (str(tmp_path / "new.png"), 8000, 2)
    found = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
            found[path.stem] = image.tobytes()
    assert found["new"] == found["again"]
    assert len(set(found.values())) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["evaluate", "{run}", "-m", "kid_eflite0"], EvaluationError, "Did you mean 'kid_efflite0'"),
        (["evaluate", "{run}/nowhere"], RunError, "is no run directory"),
        (["evaluate", "{run}/../../images"], SpecError, "--against: is missing"),
        (["evaluate", "{run}/../../images", "--seed", "1"], SpecError, "--seed: .* leave --seed out"),
        (["evaluate", "{run}/../../images", "-m", "latency_ms"], SpecError, "latency_ms: is asked of a system"),
        (["evaluate", "{run}", "-m", "ppl-wend_pixels"], EvaluationError, "biggan has no w, .*; use ppl-zend_pixels"),
        (["evaluate", "{run}", "--balance", "even"], SpecError, "neither data nor uniform"),
        (["evaluate", "{run}", "--figure", "a.png"], SpecError, "--figure: .* -m memorised_pixels"),
        (["compare-sets", "{run}/../../images", "{run}/../../nothing"], DataError, "does not exist"),
        (["evaluate", "{run}", "--snapshot", "kimg-5"], RunError, "it has kimg-000000.000, kimg-000008.000"),
        (["sample", "{run}", "--class", "brigt"], SpecError, "Did you mean 'bright'"),
        (
            ["sample", "{run}", "--rows", "1", "--out", "/dev/null/grid.png"],
            MachineError,
            "choose another place with --out",
        ),
    ],
)
def test_mistakes_are_explained(run: Path, arguments: list[str], error: type[BessemerError], text: str) -> None:
    with pytest.raises(error) as raised:
        invoke(*(a.format(run=run) for a in arguments))
    assert re.search(text, str(raised.value))


def test_run_without_snapshots_says_when_they_come(run: Path, tmp_path: Path) -> None:
    young = RunDirectory.create(tmp_path, RunDirectory.open(run).job())
    for verb in ("evaluate", "sample"):
        with pytest.raises(CheckpointError, match="has no snapshot yet"):
            invoke(verb, young.path)
