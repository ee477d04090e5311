"""A search over several hosts: trials whose workers are on different hosts, one of which dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.cluster.netns import ROOT, SCRIPT, Hosts, network_hosts
from tests.orchestration.processes import wait_for
from tests.orchestration.test_search import JOB, SEARCH, newest_checkpoint

from bessemer.data.packing.pack import pack
from bessemer.tracking.journal import read_journal
from bessemer.tracking.search_journal import read_search

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.cluster]


def search_on(hosts: Hosts, file: Path, directory: Path) -> subprocess.Popen[str]:
    """A search whose driver runs on the head. Workers find the package where it does."""
    words = ["search", "run", file, "--dir", directory, "--address", f"{hosts.address('head')}:6379"]
    command = [sys.executable, SCRIPT, "exec", "head", "env", "-C", ROOT / "platform"]
    command += [sys.executable, "-m", "bessemer.cli", *words]
    env = {**os.environ, "BESSEMER_NETNS": hosts.directory.name}
    return subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_search_over_hosts_outlives_one_of_them(tmp_path: Path) -> None:
    """Three hosts with one core each, trials with two workers: after a power cut, the other two take over."""
    pack("digits", tmp_path / "digits", size=8, mode="L", limit=20)
    job = {**JOB, "data": {"path": str(tmp_path / "digits")}, "resources": {}, "checkpoint": {"every_kimg": 0.32}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    fields = {
        "objective": {"metric": "kid_pixels", "rungs_kimg": [1.6, 3.2], "samples": [16, 32]},
        "final": {"metric": "fd_pixels", "top": 2, "samples": 24, "draws": 2},
        "scheduler": {"name": "none"},
        "budget": {"trials": 2},
        "workers": 2,
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({**SEARCH, **fields}))
    directory = tmp_path / "search"
    run = directory / "trials" / "t0000"
    with network_hosts() as hosts:
        process = search_on(hosts, tmp_path / "search.yaml", directory)
        wait_for("a checkpoint", lambda: newest_checkpoint(run) >= 320, process, 300)
        (placed,) = [r["hosts"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "placed"]
        assert list(placed.values()) == [1, 1], "one worker on each of two hosts"
        victim = next(host for host in placed if host != "head")
        hosts("kill", victim)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    table = read_search(directory)
    assert [(trial.state, trial.rung) for trial in table.trials.values()] == [("finished", 2)] * 2
    assert table.trials[0].retries == 1
    assert table.final_is_over
    journal = read_journal(run / "journal.jsonl")
    resumed = next(r for r in journal if r.get("event") == "resumed")
    assert resumed["nimg"] >= 320
    placed_later = [r["hosts"] for r in journal if r.get("event") == "placed"][1:]
    assert placed_later
    assert all(victim not in hosts for hosts in placed_later)
