"""Runs survive: a killed worker is replaced, a killed run resumes, and both end bit-equal to an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.orchestration.processes import bessemer, digits_job, images_seen, torchrun, wait_for, worker_pid

from bessemer.tracking.journal import read_journal
from bessemer.tracking.runs import load_run

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

JOB = """
name: kill
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 1.2, batch_size: 16, slice_size: 8, zero_stage: 1, log_every_kimg: 0.1}
ema: {half_life_kimg: 0.2}
checkpoint: {every_kimg: 0.2}
evaluation: {metrics: [], every_kimg: 0.6, grid: 2}
tracking: {mlflow: false}
resources: {workers: 2, cpus_per_worker: 0.5}
"""
END = "kimg-000001.200"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_job(tmp_path_factory.mktemp("kill"), JOB)


@pytest.fixture(scope="module")
def undisturbed(job: Path) -> Path:
    """The same job under plain torchrun, without Ray."""
    run = job.parent / "undisturbed"
    process = torchrun(job, run)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return run


def assert_same_weights(a: Path, b: Path) -> None:
    """Weights, optimizer states and averages of both workers, and buffers, are the same to the last bit."""
    files = sorted(p.name for p in (a / "checkpoints" / END).glob("*.safetensors"))
    assert files == ["rank-00000.safetensors", "rank-00001.safetensors", "shared.safetensors"]
    compared = 0
    for name in files:
        ours, theirs = (load_file(run / "checkpoints" / END / name) for run in (a, b))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
            compared += value.numel()
    assert compared > 4 * 500_000
    snapshot = Path("snapshots") / END / "weights.safetensors"
    assert (a / snapshot).read_bytes() == (b / snapshot).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_replaced(job: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals) -> None:
    """By SIGTERM too: Ray ends its processes so when a node goes away, and the run is to go on elsewhere."""
    run = tmp_path / "run"
    process = bessemer("train", job, "--run-dir", run)
    wait_for("the run to be under way", lambda: images_seen(run) >= 500, process)
    assert psutil.Process(worker_pid(run, 1)).nice() == psutil.Process().nice(), "it lets others go first"
    beside = [" ".join(each.cmdline()) for each in psutil.Process(process.pid).children(recursive=True)]
    assert any("/raylet " in each for each in beside)
    assert not [each for each in beside if "log_monitor" in each], "nobody reads what it looks for"
    os.kill(worker_pid(run, 1), number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    events = [r["event"] for r in read_journal(run / "journal.jsonl") if r["kind"] == "event"]
    assert "workers_lost" in events
    assert "resumed" in events
    assert events[-1] == "finished"
    assert_same_weights(run, undisturbed)


@pytest.mark.parametrize("whom", ["one worker", "torchrun"])
def test_sigterm_under_torchrun_writes_a_checkpoint(job: Path, undisturbed: Path, tmp_path: Path, whom: str) -> None:
    run = tmp_path / "run"
    process = torchrun(job, run)
    wait_for("the run to be under way", lambda: images_seen(run) >= 300, process)
    os.kill(worker_pid(run, 1) if whom == "one worker" else process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    if whom == "one worker":
        assert re.search(r"exitcode\s*: 75", output), output
    (stopped,) = (r for r in read_journal(run / "journal.jsonl") if r.get("event") == "preempted")
    assert (run / "checkpoints" / f"kimg-{stopped['nimg'] / 1000:010.3f}" / "manifest.json").is_file()
    assert load_run(run).state == "stopped"
    again = torchrun(job, run)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    resumed = [r["nimg"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "resumed"]
    assert resumed == [stopped["nimg"]]
    assert_same_weights(run, undisturbed)


def test_sigterm_to_the_driver_stops_a_run_that_resumes(job: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = bessemer("train", job, "--run-dir", run)
    wait_for("the run to be under way", lambda: images_seen(run) >= 300, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert f"go on with: bessemer resume {run}" in output
    events = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "event"]
    assert [r["event"] for r in events[-2:]] == ["preempted", "stopped"]
    stopped = events[-2]["nimg"]
    assert 300 <= stopped < 1200
    assert load_run(run).state == "stopped"
    again = bessemer("resume", run)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    resumed = [r["nimg"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "resumed"]
    assert resumed == [stopped]
    assert_same_weights(run, undisturbed)


def test_a_killed_run_resumes(job: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = bessemer("train", job, "--run-dir", run)
    wait_for("the run to be under way", lambda: images_seen(run) >= 500, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)
    assert not any(r.get("event") == "finished" for r in read_journal(run / "journal.jsonl"))
    again = bessemer("resume", run)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert_same_weights(run, undisturbed)
    assert (run / "report.html").is_file()
    refused = bessemer("resume", run)
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "has finished already" in output
