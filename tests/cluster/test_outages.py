"""Single outages on hosts with addresses of their own, and what commands say meanwhile; `make test-cluster`, not CI."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import boto3
import pytest
from tests.cluster.breaking import S3_KEYS, events, process_on, submit, wait_for
from tests.cluster.netns import Hosts, resumptions, wait_for_images, wait_for_workers
from tests.orchestration.processes import images_seen

from bessemer.training.stopping import EXIT_STOPPED

pytestmark = [pytest.mark.cluster]


def follow(hosts: Hosts, run: Path) -> subprocess.Popen[str]:
    """`bessemer logs --follow`, which has begun to print: Ray's own first line is read already."""
    following = hosts.client("logs", run.name, "--follow")
    assert following.stdout is not None
    assert following.stdout.readline()
    return following


def the_rest(following: subprocess.Popen[str]) -> str:
    """What it printed until its end. `communicate` would miss what was read ahead."""
    assert following.stdout is not None
    with following:
        return following.stdout.read()


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
    boto3.client("s3", endpoint_url=hosts.settings["AWS_ENDPOINT_URL"], **S3_KEYS).create_bucket(Bucket="runs")
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


def test_a_head_that_dies_takes_a_driver_with_it_but_not_its_work(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    """Where the driver sits on the head. What the head knew is back after its start, and the run can be resumed."""
    run = submit(hosts, job, tmp_path)
    wait_for(lambda: events(run, "checkpoint"), hosts, run)
    hosts("kill", "head")
    hosts("start", "head")
    wait_for(lambda: '"failed"' in hosts.bessemer("status", run.name, "--json"), hosts, run)
    assert hosts.bessemer("submit", "--resume", run.name).splitlines()[1] == f"{run.name}.2"
    wait_for_workers(run, 1, 3, hosts)
    assert resumptions(run)[0][1] >= 480
    hosts.bessemer("stop", run.name)


def test_nodes_that_do_not_reach_each_other(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    """Both reach the head, so that Ray is content; what gloo would wait for in vain is named at once."""
    there = hosts.address("worker-2")
    hosts("exec", "worker-1", "ip", "route", "add", "unreachable", there)
    try:
        run = submit(hosts, job, tmp_path, "resources.min_workers=3", "resources.max_failures=0")
        output = hosts.bessemer("logs", run.name, "--follow", code=2)
    finally:
        hosts("exec", "worker-1", "ip", "route", "del", "unreachable", there)
    assert re.search(rf"worker \d: does not reach worker \d at {there}:\d+: No route to host; let the nodes", output)


def test_commands_go_on_when_the_head_comes_back(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    """A power cut closes no connection: who follows the log must notice by himself, and miss no line."""
    run = submit(hosts, job, tmp_path, driver_on="host=worker-1")
    wait_for_images(run, 96, hosts)
    following = follow(hosts, run)
    hosts("kill", "head")
    out = hosts.bessemer("status", run.name, code=2)
    assert re.search(r"nothing answers at \S+:8265 \((No route to host|timed out)\); give", out), out
    time.sleep(20)
    hosts("start", "head")
    wait_for_images(run, images_seen(run) + 96, hosts)
    hosts.bessemer("stop", run.name)
    shown = the_rest(following)
    assert following.returncode == EXIT_STOPPED, shown
    assert "does not answer any more" in shown
    assert "answers again" in shown
    printed = [line for line in shown.splitlines() if "kimg  " in line]
    expected = [line for line in hosts.bessemer("logs", run.name).splitlines() if "kimg  " in line]
    assert printed == expected


def test_a_log_that_is_lost_with_its_host_is_not_waited_for(hosts: Hosts, job: Path, tmp_path: Path) -> None:
    run = submit(hosts, job, tmp_path, driver_on="host=worker-2")
    wait_for_images(run, 96, hosts)
    following = follow(hosts, run)
    hosts("kill", "worker-2")
    try:
        out = hosts.bessemer("logs", run.name, code=2)
        assert f"{run.name}: its log is on the node of its driver, which does not answer; what its workers print" in out
        shown = the_rest(following)
        assert following.returncode == 1, shown
        assert shown.splitlines()[-1] == f"go on with: bessemer submit --resume {run.name}"
        assert re.search(r"state +failed", hosts.bessemer("status", run.name))
    finally:
        hosts("start", "worker-2")
