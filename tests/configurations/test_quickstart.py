"""Whole configurations: what a newcomer types, shortened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bessemer.spec.load import load_job
from bessemer.tracking.journal import read_journal

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))

pytestmark = [
    pytest.mark.configuration,
    # MLflow's own use of SQLAlchemy; Python hides it from people, pytest does not.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]


def bessemer(cwd: Path, *arguments: object) -> str:
    command = [sys.executable, "-c", "from bessemer.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=cwd)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_quickstart_learns_and_shows_it(tmp_path: Path) -> None:
    """Two workers under Ray, MLflow on sqlite, KID well below the untrained generator's, and everything reviewable."""
    short = ["training.total_kimg=6", "evaluation.every_kimg=3", "evaluation.samples=200"]
    short += ["ema.profiles=[0.05, 0.1]", "ema.store_every_kimg=1", "tracking.registry=true"]
    changes = [argument for change in short for argument in ("--set", change)]
    output = bessemer(tmp_path, "quickstart", "digits", "--job", ROOT / "jobs" / "quickstart.yaml", *changes)
    last = output.strip().splitlines()[-1]
    match = re.fullmatch(r"quickstart ok: kid_efflite0 ([\d.]+) -> ([\d.]+), report runs/quickstart/report\.html", last)
    assert match, last
    before, after = map(float, match.groups())
    assert after < 0.6 * before

    run = tmp_path / "runs" / "quickstart"
    records = read_journal(run / "journal.jsonl")
    alarms = [r for r in records if r.get("event") in ("collapse_suspected", "update_skipped", "rolled_back")]
    assert alarms == []
    kids = [r for r in records if r["kind"] == "evaluation" and r["metric"] == "kid_efflite0"]
    assert [r["nimg"] for r in kids] == [0, 3008, 6016]
    assert all(r["samples"] == 200 and r["standard_error"] > 0 for r in kids)
    grids = [np.asarray(Image.open(run / r["path"])) for r in records if r["kind"] == "samples"]
    assert [g.shape for g in grids] == [(256, 256, 3)] * 3
    assert grids[-1].std() > 30  # strokes on a ground, not one grey
    sheets = {r["title"]: np.asarray(Image.open(run / r["path"])) for r in records if r["kind"] == "sheet"}
    assert {title: picture.shape for title, picture in sheets.items()} == {
        "Truncation": (96, 256, 3), "Interpolation": (128, 256, 3), "Classes": (320, 256, 3)
    }  # fmt: skip
    page = (run / "report.html").read_text()
    assert "kid_efflite0" in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "bessemer"]
    (stored,) = client.search_runs([experiment.experiment_id])
    assert stored.info.status == "FINISHED"
    history = client.get_metric_history(stored.info.run_id, "evaluation/kid_efflite0")
    assert [(m.step, m.value) for m in history] == [(r["nimg"], r["value"]) for r in kids]
    best = client.get_model_version_by_alias("quickstart", "best")
    assert float(best.tags["bessemer.value"]) == min(r["value"] for r in kids)

    # Review, from the command line.
    (listed,) = json.loads(bessemer(tmp_path, "runs", "--json"))
    assert listed["state"] == "finished"
    bessemer(tmp_path, "sample", run, "--out", "grid.png", "--rows", 4)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (128, 128)
    bessemer(tmp_path, "ema", "reconstruct", run, "--sigma-rel", 0.07, "--out", "wide")
    bessemer(tmp_path, "sample", run, "--snapshot", "wide", "--out", "wide.png", "--rows", 4)
    drawn = np.asarray(Image.open(tmp_path / "wide.png"))
    assert drawn.std() > 30
    again = json.loads(bessemer(tmp_path, "evaluate", run, "--samples", 200, "--json"))
    value = next(r["value"] for r in again if r["metric"] == "kid_efflite0")
    assert value == pytest.approx(kids[-1]["value"], rel=1e-4)  # one process judges what two judged


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.stem)
def test_job_files_are_valid(path: Path) -> None:
    assert load_job(path).name
