"""Hosts with addresses of their own: a run is submitted over the network, followed, stopped and resumed."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.cluster.netns import Hosts, losses, network_hosts, resumptions, wait_for_images, wait_for_workers
from tests.orchestration.processes import digits_job, torchrun

from bessemer.tracking.journal import read_journal

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

JOB = """
name: hosts
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.6, batch_size: 12, slice_size: 4, zero_stage: 1, log_every_kimg: 0.048}
ema: {half_life_kimg: 0.2}
checkpoint: {every_kimg: 0.24}
evaluation: {metrics: [], every_kimg: 0.6, grid: 2}
tracking: {mlflow: false}
resources: {workers: 3, cpus_per_worker: 1}
"""
END = "kimg-000000.600"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_job(tmp_path_factory.mktemp("hosts"), JOB)


@pytest.fixture(scope="module")
def undisturbed(job: Path) -> Path:
    """The same run on this machine, without Ray."""
    run = job.parent / "undisturbed"
    output, _ = (process := torchrun(job, run, workers=3)).communicate(timeout=300)
    assert process.returncode == 0, output
    return run


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with network_hosts() as made:
        yield made
        left = made.processes()
    assert not made.directory.exists()
    assert made.directory.name not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert made.directory.name not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def assert_same_weights(run: Path, reference: Path, end: str = END) -> None:
    """All weights, optimizer states, averages and buffers are the same to the last bit."""
    compared = 0
    files = sorted(p.name for p in (reference / "checkpoints" / end).glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        ours, theirs = (load_file(each / "checkpoints" / end / name) for each in (run, reference))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
            compared += value.numel()
    assert compared > 4 * 500_000


def test_a_run_over_the_network_ends_as_a_local_one(hosts: Hosts, job: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Submitted, stopped, and resumed from its uploads, after its directory was lost."""
    store = f"file://{tmp_path}/store"
    upload = ["--set", f"checkpoint.upload={store}"]
    name = hosts.bessemer("submit", job, "--runs", tmp_path / "first", *upload).splitlines()[1]
    run = tmp_path / "first" / name
    wait_for_images(run, 96, hosts)
    shown = hosts.bessemer("status", name)
    assert re.search(r"workers +3 on head \(1\), worker-1 \(1\), worker-2 \(1\)", shown), shown
    assert f"/#/jobs/{name}" in shown
    assert "go on with: bessemer submit --resume" in hosts.bessemer("stop", name)
    at = next(r["nimg"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "preempted")
    assert 96 <= at < 600
    shutil.rmtree(run)
    run = tmp_path / "second" / name
    output = hosts.bessemer("submit", "--resume", f"{store}/{name}", "--runs", run.parent, "--follow")
    assert f"finished: {run}" in output, output
    assert resumptions(run) == [(3, at)]
    assert hosts.bessemer("status", name, "--watch").splitlines()[-1].split()[1:3] == ["finished", "0.6/0.6"]
    logs = [(run / "logs" / f"worker-{rank}.log").read_text() for rank in range(3)]
    assert all("of 3, process" in log for log in logs)
    assert_same_weights(run, undisturbed)


@pytest.mark.skipif(shutil.which("cc") is None, reason="a wrong clock needs a C compiler")
def test_a_clock_that_is_wrong_changes_times_and_nothing_else(
    hosts: Hosts, job: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A quarter of an hour late, on the host of the driver and of a worker."""
    hosts("kill", "worker-2")
    hosts("start", "worker-2", "--clock", -900)
    try:
        began = time.time()
        words = ["--driver-on", "host=worker-2", "--set", "training.total_kimg=0.24"]
        name = hosts.bessemer("submit", job, "--runs", tmp_path, "--follow", *words).splitlines()[1]
        run = tmp_path / name
        events = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "event"]
        # It was wrong indeed: for the driver, which wrote the first event, and for one worker.
        assert events[0]["time"] < began - 600
        logs = [(run / "logs" / f"worker-{rank}.log").read_text() for rank in range(3)]
        assert sum(time.mktime(time.strptime(log[:19], "%Y-%m-%d %H:%M:%S")) < began - 600 for log in logs) == 1
        (note,) = (str(each["reason"]) for each in events if each["event"] == "note")
        assert re.match(r"the clock of node worker-2 is off by (89\d|900) s or more; times in the journal", note)

        assert {"workers_lost", "resumed", "waiting", "warning"}.isdisjoint(each["event"] for each in events)
        assert losses(run) == {nimg: each for nimg, each in losses(undisturbed).items() if nimg <= 240}
        shown = hosts.bessemer("status", name)
        assert re.search(r"state +finished for 0:0", shown), shown
        assert re.search(r"checkpoint +0.24 kimg, 0:0[0-5]:\d\d ago", shown), shown
    finally:
        hosts("kill", "worker-2")
        hosts("start", "worker-2")


@pytest.mark.cluster
def test_a_run_shrinks_and_grows_with_its_hosts(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    """3 workers, 2 while a host is dead, and 3 again; the losses are those of an undisturbed run."""
    long = ["training.total_kimg=40", "training.batch_size=48", "training.slice_size=8", "checkpoint.every_kimg=0.48"]
    # With the preset's rates, differences of the last bit grow tenfold in a few steps of an adversarial game; and where
    # a gradient is near 0, Adam makes a whole step of its rounding unless eps is above it.
    for network in ("generator", "discriminator"):
        long += [f"training.optimizers.{network}.lr=1e-5", f"training.optimizers.{network}.eps=1e-4"]
    settings = [word for field in long for word in ("--set", field)]
    elastic = ["--set", "resources.min_workers=2", "--set", "resources.placement=spread"]
    name = hosts.bessemer("submit", job, "--runs", tmp_path, *settings, *elastic).splitlines()[1]
    run = tmp_path / name
    wait_for_images(run, 960, hosts)  # the checkpoint at 480 is long complete
    assert (run / "checkpoints" / "kimg-000000.480" / "manifest.json").is_file()
    hosts("kill", "worker-2")
    wait_for_workers(run, 1, 2, hosts)
    hosts("start", "worker-2")
    wait_for_workers(run, 2, 3, hosts)
    hosts.bessemer("stop", name)
    events = [r["event"] for r in read_journal(run / "journal.jsonl") if r["kind"] == "event"]
    assert events.count("workers_lost") == 1
    (_, back_to), (_, grown_at) = resumptions(run)
    assert back_to >= 480, "the newest checkpoint was not used"
    stopped_to_grow = next(r["nimg"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "preempted")
    assert grown_at == stopped_to_grow, "images were repeated to grow"

    seen = losses(run)
    local = tmp_path / "local"
    shorter = [f"training.total_kimg={max(seen) / 1000}", "evaluation.every_kimg=40", *long[1:]]
    process = torchrun(job, local, 3, *(word for field in shorter for word in ("--set", field)))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    expected = losses(local)
    assert list(seen) == list(expected)
    for nimg, values in seen.items():
        assert values == pytest.approx(expected[nimg], rel=1e-5, abs=1e-5), (
            f"at {nimg} images, resumed {resumptions(run)}"
        )


def test_a_client_without_the_token_is_refused(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    for token, why in ((tmp_path / "wrong", "refuses the token"), (tmp_path / "none", "cannot be read")):
        process = hosts.client("submit", job, "--runs", tmp_path, RAY_AUTH_TOKEN_PATH=str(token), HOME=str(tmp_path))
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2
        assert why in output
    assert not list(tmp_path.glob("hosts-*"))
