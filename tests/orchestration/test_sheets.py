"""Sheets of a real run: what each evaluation and the end of the run leave beside the grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.orchestration.processes import digits_job, torchrun

from bessemer.data.reading.opening import open_job_data
from bessemer.spec.load import load_job
from bessemer.tracking.journal import read_journal
from bessemer.tracking.pictures import pictures_of
from bessemer.tracking.runs import load_run

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

JOB = """
name: sheets
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.032, batch_size: 16, slice_size: 8}
evaluation: {metrics: [memorised_pixels], samples: 16, every_kimg: 1.0, grid: 2}
tracking: {mlflow: false}
resources: {workers: 1}
"""


def test_each_evaluation_leaves_neighbours_and_the_end_leaves_sheets(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(digits_job(tmp_path, JOB), run, workers=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    records = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "sheet"]
    last = ["Nearest neighbours", "Truncation", "Interpolation", "Classes"]
    assert [r["title"] for r in records if r["nimg"] == 0] == last[:1]
    assert [r["title"] for r in records if r["nimg"] == 32] == last
    shapes = {r["title"]: np.asarray(Image.open(run / r["path"])).shape for r in records}
    assert shapes == {
        "Nearest neighbours": (96, 256, 3),  # 12 pairs, four in a row
        "Truncation": (96, 256, 3),
        "Interpolation": (128, 256, 3),
        "Classes": (320, 256, 3),
    }
    # Right of each generated image is the real one that the record names.
    right = np.asarray(Image.open(run / records[1]["path"])).reshape(3, 32, 4, 2, 32, 3)[:, :, :, 1].swapaxes(1, 2)
    measured = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "evaluation"]
    ids = np.array([pair["real"] for pair in measured[1]["details"]["pairs"][:12]])
    with open_job_data(load_job(run / "job.yaml").data) as dataset:
        images = dataset.read_fields(ids)["images"]
    assert np.array_equal(right.reshape(12, 32, 32, 3), images.transpose(0, 2, 3, 1))
    shown = pictures_of(load_run(run))["sheets"]
    assert [(one["label"], one["kimg"]) for one in shown] == [(title, 0.032) for title in shapes]


def test_a_run_that_stops_early_leaves_them_too(tmp_path: Path) -> None:
    job = JOB.replace("memorised_pixels", "kid_pixels").replace("total_kimg: 0.032", "total_kimg: 10")
    job = job.replace("every_kimg: 1.0", "every_kimg: 0.016, stop_after_kimg: 0.032")
    job = job.replace("slice_size: 8}", "slice_size: 8, optimizers: {generator: {lr: 1.0e-12}}}")  # cannot improve
    run = tmp_path / "run"
    process = torchrun(digits_job(tmp_path, job), run, workers=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    journal = read_journal(run / "journal.jsonl")
    (stopped,) = [r["nimg"] for r in journal if r.get("event") == "stopped_early"]
    drawn = [(r["title"], r["nimg"]) for r in journal if r["kind"] == "sheet"]
    assert drawn == [(title, stopped) for title in ("Truncation", "Interpolation", "Classes")]
