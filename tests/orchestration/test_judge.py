"""What an evaluation leaves when a part of it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.data.packing.pack import pack
from bessemer.data.reading.opening import open_job_data
from bessemer.errors import EvaluationError
from bessemer.orchestration.evaluation import Judge
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import System
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, sampled_state, save_snapshot
from bessemer.training.distributed import Workers

METRICS = ["bits_per_dim", "kid_pixels"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    pack("digits", tmp_path / "digits", size=8, limit=40)
    job = {
        "name": "judged", "system": {"name": "glow", "preset": "tiny8"}, "data": {"path": str(tmp_path / "digits")},
        "training": {"total_kimg": 1, "batch_size": 8, "slice_size": 8},
        "evaluation": {"metrics": METRICS, "samples": 40, "grid": 2},
    }  # fmt: skip
    return RunDirectory.create(tmp_path / "runs", JobSpec.model_validate(job))


def flow(run: RunDirectory, breaks: str) -> tuple[System, SnapshotInfo]:
    """A Glow that cannot draw: its weights are NaN; or one coupling scales by e^-100, which the density can bear."""
    with open_job_data(run.job().data) as dataset:
        manifest = dataset.manifest
    system = build("glow", "tiny8", data=manifest.facts)
    system.init_weights(torch.Generator().manual_seed(0))
    last = system.networks()["flow"].levels[0].steps[-1].conv3.conv  # type: ignore[union-attr,index]
    with torch.no_grad():
        last.bias[2:] = torch.nan if breaks == "weights" else -100.0  # type: ignore[union-attr,index]
    info = SnapshotInfo(
        system="glow", config=system.config.model_dump(mode="json"), nimg=8, ema={"half_life_kimg": 1.0}, seed=0,
        data_hash=manifest.hash, class_names=list(manifest.classes), class_counts=list(manifest.class_counts),
    )  # fmt: skip
    return system, info


def judged(run: RunDirectory, system: System, info: SnapshotInfo) -> tuple[list[dict[str, Any]], str]:
    """What was written, and the error."""
    written: list[dict[str, Any]] = []

    def write(kind: str, nimg: int, **fields: Any) -> None:
        written.append({"kind": kind, "nimg": nimg, **fields})

    workers = Workers(rank=0, size=1, device=torch.device("cpu"))
    with open_job_data(run.job().data) as dataset, pytest.raises(EvaluationError) as raised:
        Judge(run, run.job(), dataset, workers, write)(system, info)
    return written, str(raised.value)


def test_likelihoods_stand_where_sampling_fails(run: RunDirectory) -> None:
    written, error = judged(run, *flow(run, "sampling"))
    assert [(r["kind"], r.get("metric")) for r in written] == [("evaluation", "bits_per_dim"), ("samples", None)]
    assert 0 < written[0]["value"] < 1e3
    assert error.startswith("generated images: 40 of 40 hold NaN or infinity (number 0, 1, 2, 3, 4, 5, 6, 7, ...). All")
    assert "evaluation.truncation" in error


def test_weights_that_are_not_finite_are_named_once_for_each_part(run: RunDirectory) -> None:
    written, error = judged(run, *flow(run, "weights"))
    assert [r["kind"] for r in written] == ["samples"]
    parts = error.splitlines()
    assert [part.partition(":")[0] for part in parts] == ["likelihoods", "generated images"]
    assert all("The weights of flow are not finite: the run has diverged" in part for part in parts)


def test_the_command_prints_what_it_found_before_it_fails(run: RunDirectory) -> None:
    system, info = flow(run, "sampling")
    save_snapshot(run.path / "snapshots" / "kimg-000000.008", sampled_state(system), info)
    result = CliRunner().invoke(app, ["evaluate", str(run.path), "--json", "--device", "cpu"])
    assert isinstance(result.exception, EvaluationError)
    assert [record["metric"] for record in json.loads(result.stdout)] == ["bits_per_dim"]
