"""Runs as jobs of a real Ray cluster on loopback, with a token: submitted, followed, stopped, resumed, refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.orchestration.processes import digits_job, images_seen

from bessemer.errors import BessemerError, MachineError, SpecError
from bessemer.orchestration.dashboard import dashboard_url
from bessemer.orchestration.submission import check_before_sending
from bessemer.spec.load import load_job
from bessemer.tracking.journal import read_journal

JOB = """
name: sent
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.64, batch_size: 16, slice_size: 8, zero_stage: 1, log_every_kimg: 0.05}
ema: {half_life_kimg: 0.2}
checkpoint: {every_kimg: 0.32}
evaluation: {metrics: [], every_kimg: 0.64, grid: 2}
tracking: {mlflow: false}
resources: {workers: 1, cpus_per_worker: 0.5, address: "elsewhere:6379"}
"""
END = "kimg-000000.640"
CLUSTER = Path(__file__).resolve().parents[2] / "cluster" / "local" / "cluster"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_job(tmp_path_factory.mktemp("sent"), JOB)


def test_a_job_is_made_fit_to_travel(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job.parent)
    sent, notes = check_before_sending(load_job(job, ["data.path=digits"]))
    assert sent.data.path == str(job.parent / "digits")
    assert sent.resources.address is None
    assert notes == []
    sent, (note,) = check_before_sending(load_job(job, ["data.path=/cluster/only"]))
    assert sent.data.path == "/cluster/only"
    assert "/cluster/only is not on this machine" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=nowhere", r"data\.path: nowhere is not on this machine; write the absolute path"),
        ("system.preset=tiny", r"system\.preset: .*'tiny'"),
        ("training.batch_size=320", r"training\.batch_size: 320 is more than the 200 images"),
    ],
)
def test_a_bad_job_is_not_sent(job: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(BessemerError, match=message):
        check_before_sending(load_job(job, [change]))


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:99999", "http://", "http://head:8265/jobs"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(SpecError, match=r"--address .*: is no address of a Ray dashboard; write http://HOST:8265"):
        dashboard_url(address)


class Head(NamedTuple):
    gcs: int
    token: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gcs + 1}"


def free_port(following: int = 0) -> int:
    """A port that nobody uses, and none of the `following` ones either."""
    for port in random.sample(range(21_000, 31_000), 100):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for each in range(port, port + following + 1):
                held.enter_context(socket.socket()).bind(("127.0.0.1", each))
            return port
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head and a node, made and ended by `cluster/local/cluster`, with own ports, directory and token."""
    files = Path(tempfile.mkdtemp(prefix="bsm-", dir="/tmp"))
    # The cluster has an installation of its own, which must not be used: the package travels with the submission.
    (files / "own" / "bessemer").mkdir(parents=True)
    (files / "own" / "bessemer" / "__init__.py").write_text("raise ImportError('not what was sent')")
    head_port = free_port(following=10)
    env = {**os.environ, "BESSEMER_CLUSTER": str(files), "BESSEMER_CLUSTER_PORT": str(head_port)}
    env |= {"PYTHONPATH": str(files / "own"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def cluster(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CLUSTER, *words], env=env, stdout=subprocess.PIPE, text=True, timeout=180, check=True)

    try:
        cluster("up", "1")
        told = dict(re.findall(r"(\w+)=(\S+)", cluster("env").stdout))
        token = Path(told["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o077 == 0, "others may read the token"
        found = Head(head_port, token.read_text())
        assert told["RAY_API_SERVER_ADDRESS"] == found.url
        yield found
        started = [int(file.read_text()) for file in files.glob("*.pid")]
        assert len(started) == 2
        cluster("down")
        for pid in started:
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    finally:
        cluster("down")
        shutil.rmtree(files, ignore_errors=True)


def bessemer(head: Head, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bessemer.cli", *map(str, words), "--address", head.url]
    # Addresses of other clusters in the environment must not win over --address.
    env = {
        **os.environ,
        "RAY_AUTH_TOKEN": head.token,
        "RAY_ADDRESS": "127.0.0.1:1",
        "RAY_API_SERVER_ADDRESS": "http://h:1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def status(head: Head, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bessemer(head, "status", name, "--json").stdout)
    return found


@pytest.mark.multiprocess
@pytest.mark.slow
def test_clusters_that_cannot_be_reached_are_named(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    assert dashboard_url(f"127.0.0.1:{head.gcs + 1}/") == head.url
    with pytest.raises(MachineError, match=rf"is the port that nodes join by \(GCS\).*submitted to {head.url}\."):
        dashboard_url(f"http://127.0.0.1:{head.gcs}")
    nobody = free_port()
    with pytest.raises(MachineError, match=rf"nothing answers at 127\.0\.0\.1:{nobody} \(Connection refused\); give"):
        dashboard_url(f"127.0.0.1:{nobody}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(MachineError, match=r"the cluster refuses the token; set RAY_AUTH_TOKEN"):
        dashboard_url(head.url)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MachineError, match=r"the cluster wants a token, and there is none here; set RAY_AUTH_TOKEN"):
        dashboard_url(head.url)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_driver_is_sent_to_nodes_that_exist(head: Head, job: Path, tmp_path: Path) -> None:
    """Ray would wait a quarter of an hour for others."""
    out = bessemer(head, "submit", job, "--runs", tmp_path, "--driver-on", "host=node-2", code=2)
    assert "--driver-on host=node-2: no node beside the head has this label; there are: host=node-1. " in out.stderr
    out = bessemer(head, "submit", job, "--runs", tmp_path, "--driver-on", "node-1", code=2)
    assert "--driver-on node-1: is no label of a node; write LABEL=VALUE" in out.stderr
    assert list(tmp_path.iterdir()) == []


ASK_TWICE = """
import os, sys
from bessemer.orchestration.submission import Cluster
before = dict(os.environ)
cluster = Cluster(sys.argv[1])
changed = {name for name in os.environ.keys() | before if os.environ.get(name) != before.get(name)}
assert changed <= {"RAY_CLIENT_MODE"}, changed  # which Ray sets when it is imported
assert cluster.submissions() == Cluster(sys.argv[1]).submissions() == []
"""


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", None])
def test_asking_a_cluster_leaves_the_environment_alone(head: Head, mode: str | None) -> None:
    env = {**os.environ, "RAY_AUTH_TOKEN": head.token} | ({"RAY_AUTH_MODE": mode} if mode else {})
    if mode is None:
        env.pop("RAY_AUTH_MODE", None)
    command = [sys.executable, "-c", ASK_TWICE, head.url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(head: Head, job: Path, tmp_path: Path) -> None:
    """Two runs of one job: one is left alone and followed, the other is stopped and resumed.

    The driver of the latter does not sit on the head, though on the same address.
    """
    words = ["--runs", tmp_path, "--driver-on", "host=node-1"]
    stopped = bessemer(head, "submit", job, *words).stdout.strip()  # whoever submitted it is gone now
    whole = bessemer(head, "submit", job, "--runs", tmp_path).stdout.strip()
    run = tmp_path / stopped
    for _ in range(1200):
        if images_seen(run) >= 50:
            break
        time.sleep(0.1)
    assert status(head, stopped)["state"] == "running"
    out = bessemer(head, "stop", stopped)
    assert f"go on with: bessemer submit --resume {stopped} --address {head.url}" in out.stderr
    assert status(head, stopped)["state"] == "stopped"
    events = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "event"]
    assert [r["event"] for r in events[-2:]] == ["preempted", "stopped"]
    at = events[-2]["nimg"]
    assert 50 <= at < 640
    assert (run / "checkpoints" / f"kimg-{at / 1000:010.3f}" / "manifest.json").is_file()

    assert f"run {run}" in bessemer(head, "logs", f"{stopped}.1").stdout.splitlines()
    near = bessemer(head, "logs", f"{stopped}x", code=2)
    assert "knows no such run" in near.stderr
    assert stopped in near.stderr
    out = bessemer(head, "submit", "--resume", stopped, "--follow")
    assert out.stdout.splitlines()[0] == f"{stopped}.2"
    assert f"finished: {run}" in out.stdout
    assert [r["nimg"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "resumed"] == [at]
    assert f"finished: {tmp_path / whole}" in bessemer(head, "logs", whole, "-f").stdout
    rows = json.loads(bessemer(head, "jobs", "--json").stdout)
    assert [(r["id"], r["state"]) for r in rows] == [
        (f"{stopped}.2", "finished"),
        (whole, "finished"),
        (stopped, "stopped"),
    ]
    assert status(head, stopped)["id"] == f"{stopped}.2"
    assert status(head, f"{stopped}.1")["state"] == "stopped"

    compared = 0
    for name in ("rank-00000.safetensors", "shared.safetensors"):
        ours, theirs = (load_file(tmp_path / each / "checkpoints" / END / name) for each in (stopped, whole))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
            compared += value.numel()
    assert compared > 4 * 500_000

    # The run knows where it came from, and who sees its directory needs no cluster to find out.
    assert json.loads(bessemer(head, "status", run, "--json").stdout)["dashboard"] == f"{head.url}/#/jobs/{stopped}.2"
    assert [p.name for p in sorted((run / "provenance").iterdir())] == ["1", "2"]
    record = json.loads((run / "run.json").read_text())
    assert record["command"][1:3] == ["submit", str(job)]
    assert f"torch=={record['packages']['torch']}" in (run / "provenance" / "2" / "lock.txt").read_text().splitlines()
