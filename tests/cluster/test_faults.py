"""A run that lives through one fault after the other, on hosts with addresses of their own; `make test-cluster`.

Faults of files, stores, MLflow and clocks by themselves are tested in tests/training, tests/tracking and
tests/orchestration/test_nodes.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
import psutil
import pytest
from tests.cluster.breaking import S3_KEYS, events, process_on, submit, wait_for
from tests.cluster.netns import ROOT, Hosts, losses, resumptions, wait_for_images
from tests.orchestration.processes import images_seen, torchrun

from bessemer.tracking.journal import read_journal

pytestmark = [pytest.mark.cluster]

Strike = Callable[[], object]


class Mlflow:
    """An MLflow server on this machine's end of the hosts' network."""

    def __init__(self, directory: Path, address: str) -> None:
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        self.uri = f"http://{address}:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", address, "--port", str(port)]
        self._command += ["--workers", "1", "--allowed-hosts", "*", "--artifacts-destination", str(directory / "files")]
        self._command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db"]
        self._address, self._process = (address, port), None

    def up(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process: Any = subprocess.Popen(
            self._command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(1200):
            with contextlib.suppress(OSError):
                socket.create_connection(self._address, 1).close()
                return
            time.sleep(0.1)
        raise AssertionError("MLflow did not come up")

    def down(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def down_for_a_minute(self) -> None:
        self.down()
        time.sleep(60)

    def points(self, name: str) -> dict[int, float]:
        """What a person would see of a metric, by images; of steps that were repeated, the newest value."""
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        history = client.get_metric_history(run.info.run_id, name)
        return {each.step: each.value for each in sorted(history, key=lambda each: each.timestamp)}


@contextlib.contextmanager
def mlflow_server(directory: Path, address: str) -> Iterator[Mlflow]:
    server = Mlflow(directory, address)
    server.up()
    try:
        yield server
    finally:
        server.down()


def delete_bucket(client: Any, name: str) -> None:
    """With all that is in it, so that nothing can be written there."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name)
    for key in [each["Key"] for page in pages for each in page.get("Contents", ())]:
        client.delete_object(Bucket=name, Key=key)
    client.delete_bucket(Bucket=name)


def gateway(hosts: Hosts) -> str:
    """This machine's address in the hosts' network."""
    return hosts.address("head").rpartition(".")[0] + ".1"


class Faults:
    """One run, and what happens to it: each fault is struck, watched and mended, and leaves a row of the table."""

    def __init__(self, hosts: Hosts, run: Path) -> None:
        self.hosts, self.run = hosts, run
        self.rows: list[dict[str, object]] = []

    def await_event(self, name: str, already: int, seconds: float = 400) -> dict[str, object]:
        wait_for(lambda: len(events(self.run, name)) > already, self.hosts, self.run, seconds)
        return events(self.run, name)[already]

    def await_steps(self, images: int = 48) -> None:
        wait_for_images(self.run, images_seen(self.run) + images, self.hosts)

    def await_checkpoint(self) -> None:
        self.await_event("checkpoint", len(events(self.run, "checkpoint")))

    def ends_workers(
        self, name: str, strike: Strike, workers: Collection[int], mend: Strike | None = None, comes_back: str = ""
    ) -> None:
        """Something after which an attempt ends, and another goes on with so many; after `mend`, all three do."""
        self.await_checkpoint()
        already, struck, seen = len(resumptions(self.run)), time.time(), images_seen(self.run)
        strike()
        self._note(name, already, struck, seen)
        if mend is not None:
            assert resumptions(self.run)[already][0] in workers, resumptions(self.run)
            mend()
        wait_for(lambda: resumptions(self.run)[-1][0] == 3, self.hosts, self.run, 400)
        grown = len(resumptions(self.run)) - 1
        if comes_back and grown > already:
            seen = int(next(r["nimg"] for r in reversed(events(self.run, "preempted"))))  # type: ignore[call-overload]
            self._note(comes_back, grown, last_step(self.run, seen), seen)
        self.await_steps()

    def costs_no_worker(self, name: str, strike: Strike, noticed: str, mend: Strike, healed: str) -> None:
        """Something that training goes on through: it is noticed, and once it is mended, what was missed follows."""
        self.await_checkpoint()
        already, before = len(resumptions(self.run)), len(events(self.run, noticed))
        strike()
        self.await_event(noticed, before)
        self.await_steps(144)
        done, mended = len(events(self.run, healed)), time.time()
        mend()
        after = self.await_event(healed, done)
        assert len(resumptions(self.run)) == already, f"{name} ended the workers"
        self._row(name, float(after["time"]) - mended, 3, 0)  # type: ignore[arg-type]

    def _note(self, name: str, already: int, struck: float, seen: int) -> None:
        wait_for(lambda: len(resumptions(self.run)) > already, self.hosts, self.run, 400)
        workers, nimg = resumptions(self.run)[already]
        wait_for_images(self.run, nimg + 48, self.hosts)
        resumed = float(events(self.run, "resumed")[already]["time"])  # type: ignore[arg-type]
        first = min(r["time"] for r in read_journal(self.run / "journal.jsonl") if is_step(r) and r["time"] > resumed)
        self._row(name, first - struck, workers, seen - nimg)

    def _row(self, name: str, seconds: float, workers: int, repeated: int) -> None:
        self.rows.append(
            {
                "fault": name,
                "seconds": round(seconds, 1),
                "workers": workers,
                "repeated": repeated,
                "load": round(os.getloadavg()[0], 1),
            }
        )
        print(*self.rows[-1].values(), sep="\t", flush=True)


def is_step(record: Mapping[str, object]) -> bool:
    return record["kind"] == "metrics"


def last_step(run: Path, nimg: int) -> float:
    """When the step ended that made it so many images."""
    return max(r["time"] for r in read_journal(run / "journal.jsonl") if is_step(r) and r["nimg"] <= nimg)


def memory_of(hosts: Hosts, host: str) -> float:
    """GB that the processes of a host have for themselves."""
    total = 0
    for process in hosts.processes(host):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().uss
    return round(total / 1e9, 2)


def test_a_run_goes_on_through_all_of_it(
    hosts: Hosts, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One fault after the other; the losses are those of an undisturbed run, and stores and MLflow miss nothing.

    BESSEMER_FAULTS names a file for the table of docs/clusters.md (`scripts/document_faults.py`).
    """
    bucket = boto3.client("s3", endpoint_url=hosts.settings["AWS_ENDPOINT_URL"], **S3_KEYS)
    bucket.create_bucket(Bucket="faults")
    started = os.times()[4]
    with capsys.disabled(), mlflow_server(tmp_path, gateway(hosts)) as mlflow:
        took = {"mlflow_start_s": round(os.times()[4] - started, 1)}
        sent = time.time()
        # The driver is not on the head, so that it outlives it; nor where hosts die, because it would die with them.
        more = ["checkpoint.upload=s3://faults/runs", "tracking.mlflow=true", f"tracking.uri={mlflow.uri}"]
        run = submit(hosts, job, tmp_path, *more, driver_on="host=worker-1")
        wait_for_images(run, 48, hosts)
        first = next(r["time"] for r in read_journal(run / "journal.jsonl") if is_step(r))
        took["submit_to_first_step_s"] = round(first - sent, 1)
        faults = Faults(hosts, run)
        faults.await_event("uploaded", 0)
        faults.await_steps(480)  # spare processes import meanwhile
        memory = {host: memory_of(hosts, host) for host in ("head", "worker-1", "worker-2")}

        def worker() -> psutil.Process:
            return process_on(hosts, "worker-2", "ray::TrainWorker")

        def limit_files(size: int) -> None:
            resource.prlimit(worker().pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def fill_and_kill() -> None:
            hosts("fill", "worker-2")
            worker().kill()

        def restart_head() -> None:
            hosts("kill", "head")
            time.sleep(10)
            hosts("start", "head")

        faults.ends_workers("kill -9 a worker", lambda: worker().kill(), {3})
        faults.ends_workers(
            "kill -9 a worker of a host whose own disk is full",
            fill_and_kill,
            {2, 3},
            lambda: hosts("free", "worker-2"),
        )
        faults.costs_no_worker(
            # Large enough for the journal, which the worker may have to write, not for its part of a checkpoint.
            "a worker's disk of the runs is full", lambda: limit_files(200_000), "checkpoint_failed",
            lambda: limit_files(resource.RLIM_INFINITY), "checkpoint",
        )  # fmt: skip
        faults.costs_no_worker(
            "the object store refuses writes", lambda: delete_bucket(bucket, "faults"), "upload_failed",
            lambda: bucket.create_bucket(Bucket="faults"), "uploaded",
        )  # fmt: skip
        faults.costs_no_worker(
            "MLflow is down for a minute", mlflow.down_for_a_minute, "warning", mlflow.up, "recovered"
        )
        faults.ends_workers("kill -9 a raylet", lambda: process_on(hosts, "worker-2", "raylet").kill(), {2, 3})
        faults.ends_workers(
            "power off a host", lambda: hosts("kill", "worker-2"), {2}, lambda: hosts("start", "worker-2"),
            "the host comes back",
        )  # fmt: skip
        faults.ends_workers(
            "cut a link", lambda: hosts("partition", "worker-2"), {2}, lambda: hosts("heal", "worker-2"),
            "the link heals",
        )  # fmt: skip
        faults.ends_workers("the head is off for 10 s, and boots", restart_head, {2, 3})

        (submission,) = json.loads(hosts.bessemer("jobs", "--json"))
        assert (submission["id"], submission["state"]) == (run.name, "running"), "a new head knows the run"
        assert "go on with: bessemer submit --resume" in hosts.bessemer("stop", run.name)
        seen_losses = losses(run)
        assert mlflow.points("loss/generator") == {n: v["loss/generator"] for n, v in seen_losses.items()}
    keys = [each["Key"] for each in bucket.list_objects_v2(Bucket="faults", Prefix="runs/")["Contents"]]
    stored = {PurePosixPath(key).parent.name for key in keys}
    assert f"kimg-{max(seen_losses) / 1000:010.3f}" in stored, "the last checkpoint is not in the store"

    local = tmp_path / "local"
    fields = ["--set", f"training.total_kimg={max(seen_losses) / 1000}"]
    output, _ = (process := torchrun(job, local, 3, *fields)).communicate(timeout=900)
    assert process.returncode == 0, output
    expected = losses(local)
    assert list(seen_losses) == list(expected)
    for nimg, values in seen_losses.items():
        assert values == pytest.approx(expected[nimg], rel=1e-5, abs=1e-5), f"at {nimg} images"
    if "BESSEMER_FAULTS" in os.environ:
        common = runpy.run_path(str(ROOT / "benchmarks" / "_common.py"))
        raw = {"faults": faults.rows, "memory_gb": memory, **took, "compared": {"steps": len(expected)}}
        common["finish"]([], raw, common["Options"](quick=False, out=Path(os.environ["BESSEMER_FAULTS"])))
