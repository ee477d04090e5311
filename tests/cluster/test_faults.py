"""What runs live through on hosts with addresses of their own. Minutes long: `make test-cluster`, not part of CI.

Faults that need no network are tested elsewhere: full disks and refusing stores in tests/training, MLflow in
tests/tracking, clocks and versions in tests/orchestration/test_nodes.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.cluster.netns import Hosts, losses, network_hosts, resumptions, wait_for_images, wait_for_workers
from tests.orchestration.processes import digits_job, images_seen, torchrun

from bessemer.tracking.journal import read_journal

pytestmark = [pytest.mark.cluster]

JOB = """
name: faults
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training:
  {total_kimg: 100, batch_size: 48, slice_size: 8, zero_stage: 1, log_every_kimg: 0.048, optimizers: {
    generator: {lr: 1.0e-6, eps: 1.0e-4}, discriminator: {lr: 1.0e-6, eps: 1.0e-4}}}
checkpoint: {every_kimg: 0.48}
evaluation: {metrics: [], every_kimg: 100, grid: 2}
tracking: {mlflow: false}
resources: {workers: 3, min_workers: 2, placement: spread}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_job(tmp_path_factory.mktemp("faults"), JOB)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with network_hosts("--store") as made:
        yield made


def submit(hosts: Hosts, job: Path, runs: Path, *fields: str) -> Path:
    words = [word for field in fields for word in ("--set", field)]
    return runs / hosts.bessemer("submit", job, "--runs", runs, *words).splitlines()[1]


def events(run: Path, *names: str) -> list[dict[str, object]]:
    return [r for r in read_journal(run / "journal.jsonl") if r.get("event") in names]


def wait_for(what: Callable[[], object], hosts: Hosts, run: Path, seconds: float = 240) -> None:
    for _ in range(int(seconds * 10)):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError(hosts.bessemer("logs", run.name))


def process_on(hosts: Hosts, host: str, name: str) -> psutil.Process:
    """The process of a host whose command line begins with, or whose program is called, `name`."""
    found = [p for p in hosts.processes(host) if p.name() == name or " ".join(p.cmdline()).startswith(name)]
    assert found, f"{host} runs no {name}"
    return min(found, key=lambda p: p.create_time())  # of workers, the one that trains: spare ones come later


def test_a_run_goes_on_through_all_of_it(
    hosts: Hosts, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker, a raylet, a host and a cable, one after the other; the losses are those of an undisturbed run."""
    run = submit(hosts, job, tmp_path)
    table = []
    for fault, workers, strike, mend in (
        ("kill -9 a worker", 3, lambda: process_on(hosts, "worker-1", "ray::TrainWorker").kill(), None),
        ("kill -9 a raylet", 2, lambda: process_on(hosts, "worker-1", "raylet").kill(), None),
        ("power off a host", 2, lambda: hosts("kill", "worker-2"), lambda: hosts("start", "worker-2")),
        ("cut a link", 2, lambda: hosts("partition", "worker-1"), lambda: hosts("heal", "worker-1")),
    ):
        before = len(resumptions(run))
        saved = [r["nimg"] for r in events(run, "checkpoint")]
        wait_for(lambda: len(events(run, "checkpoint")) > len(saved), hosts, run)  # noqa: B023
        struck, seen = time.time(), images_seen(run)
        strike()
        wait_for(lambda: len(resumptions(run)) > before, hosts, run)  # noqa: B023
        found, nimg = resumptions(run)[before]
        first = next(r["time"] for r in events(run, "resumed")[before:])
        table.append(f"{fault:18} {first - struck:6.1f} s until it resumed with {found}, {seen - nimg} images repeated")
        if mend is not None:
            assert found == workers
            mend()
        wait_for(lambda: resumptions(run)[-1][0] == 3, hosts, run)
        wait_for_images(run, resumptions(run)[-1][1] + 48, hosts)
    hosts.bessemer("stop", run.name)
    with capsys.disabled():
        print("", *table, sep="\n")
    seen_losses = losses(run)
    local = tmp_path / "local"
    fields = ["--set", f"training.total_kimg={max(seen_losses) / 1000}"]
    output, _ = (process := torchrun(job, local, 3, *fields)).communicate(timeout=900)
    assert process.returncode == 0, output
    expected = losses(local)
    assert list(seen_losses) == list(expected)
    for nimg, values in seen_losses.items():
        assert values == pytest.approx(expected[nimg], rel=1e-5, abs=1e-5), f"at {nimg} images"


def test_a_host_that_will_be_taken_away_is_left_in_time(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    """The warning of a spot instance: a checkpoint of that moment, and no image is computed twice."""
    run = submit(hosts, job, tmp_path)
    wait_for_images(run, 240, hosts)
    words = process_on(hosts, "worker-2", "raylet").cmdline()
    node = next(word.partition("=")[2] for word in words if word.startswith("--node_id="))
    reason = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "60",
    ]
    hosts("exec", "head", "ray", "drain-node", "--address", "127.0.0.1:6379", "--node-id", node, *reason)
    wait_for_workers(run, 1, 2, hosts)
    (stopped, *_) = events(run, "preempted")
    assert resumptions(run)[0] == (2, stopped["nimg"])
    assert events(run, "workers_lost") == []
    hosts.bessemer("stop", run.name)
    hosts("kill", "worker-2")  # a host that is being drained takes nothing new
    hosts("start", "worker-2")


def test_a_store_that_is_gone_for_a_while_costs_nothing(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    import boto3

    boto3.client(
        "s3",
        endpoint_url=hosts.settings["AWS_ENDPOINT_URL"],
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
    ).create_bucket(Bucket="runs")
    run = submit(hosts, job, tmp_path, "checkpoint.upload=s3://runs/all")
    wait_for(lambda: events(run, "uploaded"), hosts, run)
    hosts("partition", "store")
    wait_for(lambda: events(run, "upload_failed"), hosts, run, seconds=400)
    seen = images_seen(run)
    wait_for_images(run, seen + 480, hosts)
    uploaded = len(events(run, "uploaded"))
    hosts("heal", "store")
    wait_for(lambda: len(events(run, "uploaded")) > uploaded, hosts, run, seconds=400)
    hosts.bessemer("stop", run.name)
    assert resumptions(run) == []


def test_a_run_directory_that_one_host_does_not_see(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    hosts("exec", "worker-2", "mount", "-t", "tmpfs", "none", str(runs))
    try:
        name = hosts.bessemer("submit", job, "--runs", runs, "--set", "resources.min_workers=3").splitlines()[1]
        output = hosts.bessemer("logs", name, "--follow", code=2)
    finally:
        hosts("exec", "worker-2", "umount", str(runs))
    assert f"run directory {runs / name}: is not the same on worker-2; put --runs on storage" in output


def test_a_head_that_died_takes_the_run_with_it_but_not_its_work(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    """The driver sits on the head. A new head knows nothing of the run; its directory is enough to go on."""
    run = submit(hosts, job, tmp_path)
    wait_for(lambda: events(run, "checkpoint"), hosts, run)
    for host in ("head", "worker-1", "worker-2"):
        hosts("kill", host)
    for host in ("head", "worker-1", "worker-2"):
        hosts("start", host)
    assert "knows no such run" in hosts.bessemer("status", run.name, code=2)
    hosts.bessemer("submit", "--resume", run)
    wait_for_workers(run, 1, 3, hosts)
    assert resumptions(run)[0][1] >= 480
    hosts.bessemer("stop", run.name)
