"""A run on three hosts of which some break, for the tests of this directory that are marked `cluster`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
from tests.cluster.netns import Hosts

from bessemer.tracking.journal import read_journal

__all__ = ["BREAKING_JOB", "S3_KEYS", "events", "process_on", "submit", "wait_for"]

# So small a rate that the rounding errors of sums over two or three workers, which training multiplies, stay below 1e-5
# for 400 steps. With 1e-6, undisturbed runs of two and of three workers differ by 2.5e-5 after 200.
BREAKING_JOB = """
name: faults
seed: 3
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training:
  {total_kimg: 100, batch_size: 48, slice_size: 8, zero_stage: 1, log_every_kimg: 0.048, optimizers: {
    generator: {lr: 2.0e-7, eps: 1.0e-4}, discriminator: {lr: 2.0e-7, eps: 1.0e-4}}}
checkpoint: {every_kimg: 0.48}
evaluation: {metrics: [], every_kimg: 100, grid: 2}
tracking: {mlflow: false}
resources: {workers: 3, min_workers: 2, placement: spread}
"""
S3_KEYS = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}


def submit(hosts: Hosts, job: Path, runs: Path, *fields: str, driver_on: str | None = None) -> Path:
    words = [word for field in fields for word in ("--set", field)]
    words += [] if driver_on is None else ["--driver-on", driver_on]
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
