"""The flagships' CIFAR-10 jobs for the CPU as they stand, a few steps on digits in colour; NVAE's is in test_nvae."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bessemer.data.packing.pack import pack
from bessemer.spec.load import load_job
from bessemer.systems.snapshot import load_snapshot
from bessemer.tracking.journal import read_journal

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SHORT = [
    "data.path=digits", "training.total_kimg=0.128", "training.log_every_kimg=0.064", "evaluation.metrics=[]",
    "evaluation.untrained=false", "evaluation.samples=16", "evaluation.grid=2",
]  # fmt: skip
PARTS = {
    "biggan-cifar10-cpu": {"loss/discriminator", "loss/generator", "loss/orthogonal"},
    "stylegan2-cifar10-cpu": {"loss/generator", "penalty/path_length", "penalty/r1", "ada/p"},
}
"""What each must have trained with."""

pytestmark = pytest.mark.configuration


@pytest.mark.parametrize("stem", PARTS)
def test_trains(tmp_path: Path, stem: str) -> None:
    pack("digits", tmp_path / "digits", size=32, mode="RGB", limit=64)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    worker = ["-m", "bessemer.orchestration.worker", JOBS / f"{stem}.yaml", "--run-dir", "run"]
    changes = [word for change in SHORT for word in ("--set", change)]
    command = [sys.executable, *torchrun, load_job(JOBS / f"{stem}.yaml").resources.workers, *worker, *changes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    metrics = [r for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "metrics"]
    assert [r["nimg"] for r in metrics] == [64, 128]
    values = {name: value for r in metrics for name, value in r["values"].items()}
    assert set(values) >= PARTS[stem]
    assert all(math.isfinite(value) for value in values.values())
    system, info = load_snapshot(next((tmp_path / "run" / "snapshots").iterdir()))
    assert info.nimg == 128
    images = system.sample(torch.arange(4), torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 32, 32)
    assert images.std() > 0.01
