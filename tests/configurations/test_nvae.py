"""NVAE's job for the CPU, shortened, on digits: likelihoods while training and afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bessemer.data.packing.pack import pack
from bessemer.systems.snapshot import load_snapshot
from bessemer.tracking.journal import read_journal

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.configuration


def ran(cwd: Path, *command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600, cwd=cwd)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_bits_per_dim_falls_and_more_draws_lower_it(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits", size=32, limit=100)
    pack("digits", tmp_path / "others", size=32, limit=40)
    short = [
        "data.path=digits", "evaluation.held_out=others", "training.total_kimg=1.6", "training.batch_size=8",
        "training.slice_size=8", "resources.workers=1", "training.lr_schedule.warmup_kimg=0",
        "evaluation.every_kimg=1.6",
        "evaluation.samples=40", "evaluation.importance_samples=2", "evaluation.grid=2", "system.config.width=4",
        "system.config.standing_passes=2",
    ]  # fmt: skip
    changes = [word for change in short for word in ("--set", change)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1]
    worker = ["-m", "bessemer.orchestration.worker", ROOT / "jobs" / "nvae-cifar10-cpu.yaml"]
    ran(tmp_path, *torchrun, *worker, "--run-dir", "runs/nvae", *changes)
    run = tmp_path / "runs" / "nvae"
    records = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "evaluation"]
    assert [r["nimg"] for r in records] == [0, 1600]
    assert all((r["metric"], r["samples"], r["importance_samples"]) == ("bits_per_dim", 40, 2) for r in records)
    values = [r["value"] for r in records]
    assert values[1] < values[0] - 1
    main = "from bessemer.cli import main; main()"
    (tighter,) = json.loads(ran(tmp_path, "-c", main, "evaluate", "runs/nvae", "--importance-samples", 20, "--json"))
    assert values[1] - 0.5 < tighter["value"] < values[1]
    assert tighter["importance_samples"] == 20
    assert tighter["reference_hash"] != records[1]["reference_hash"]
    system, _ = load_snapshot(run / "snapshots" / "kimg-000001.600")
    assert system.config.channels == 1, "taken from the data"
