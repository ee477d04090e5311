"""The benchmarks for GPUs: they say so where there is none, and everything but the GPU runs here too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
SCRIPTS = sorted(p for p in GPU.glob("*.py") if p.stem[0] != "_")
JOB = GPU.parent.parent / "jobs" / "biggan-cifar10-cpu.yaml"
EACH = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)

pytestmark = [pytest.mark.configuration]


def run(path: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@EACH
def test_says_at_once_that_it_needs_a_gpu(path: Path, tmp_path: Path) -> None:
    done = run(path, tmp_path, "--quick", "--out", tmp_path / "found.json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{path.name}: needs an NVIDIA GPU")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "found.json").exists()


@EACH
def test_runs_on_the_cpu_with_tiny_networks(path: Path, tmp_path: Path) -> None:
    more: list[object] = []
    if path.stem == "cifar10":
        short = ["training.total_kimg=0.4", "training.batch_size=16", "training.slice_size=8"]
        short += [
            "evaluation.every_kimg=0.2",
            "evaluation.samples=40",
            "evaluation.grid=2",
            "checkpoint.every_kimg=0.2",
        ]
        short += ["training.log_every_kimg=0.1"]
        more = ["--job", JOB, "--minutes", 5, *(word for change in short for word in ("--set", change))]
    out = tmp_path / "found.json"
    done = run(path, tmp_path, "--device", "cpu", "--quick", "--out", out, *more)
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(out.read_text())
    assert record["quick"] is True
    assert record["raw"]
    if path.stem == "throughput":
        assert {"stylegan2", "biggan", "nvae"} <= set(record["raw"])
        assert all(record["raw"][n]["bf16"]["images_per_second"] > 0 for n in ("stylegan2", "biggan", "nvae"))
    if path.stem == "offload":
        found = record["raw"]["zero1"]
        assert found["none"]["state_bytes"] == found["optimizer"]["state_bytes"] > 0
    if path.stem == "upfirdn":
        assert all(max(v["differences"]["ours"]) < 1e-5 for v in record["raw"].values() if v["differences"])
    if path.stem == "cifar10":
        assert [nimg for nimg, _ in record["raw"]["curve"]["kid_efflite0"]] == [0, 208, 400]
        assert out.with_suffix(".png").is_file()


def test_a_training_ends_when_its_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    short = ["training.batch_size=16", "evaluation.metrics=[fd_efflite0]", "evaluation.samples=20", "evaluation.grid=2"]
    more = ["--job", JOB, "--minutes", 0.01, *(word for change in short for word in ("--set", change))]
    done = run(GPU / "cifar10.py", tmp_path, "--device", "cpu", "--out", out, *more)
    assert done.returncode == 0, done.stderr
    assert [nimg for nimg, _ in json.loads(out.read_text())["raw"]["curve"]["fd_efflite0"]] == [0]
