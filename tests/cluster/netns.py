"""The hosts of `cluster/netns/hosts`, for tests: always taken down, and skipped where they cannot be made."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.orchestration.processes import images_seen

from bessemer.tracking.journal import read_journal

__all__ = ["Hosts", "losses", "network_hosts", "resumptions", "wait_for_images", "wait_for_workers", "why_not"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "netns" / "hosts"


def why_not() -> str | None:
    """Why network namespaces cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    space = f"bsmtry{secrets.token_hex(2)}"
    made = subprocess.run(["ip", "netns", "add", space], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        tried = ["ip", "-n", space, "link", "add", "try0", "type", "veth", "peer", "name", "try1"]
        made = subprocess.run(tried, capture_output=True, text=True, check=False)
        subprocess.run(["ip", "netns", "del", space], check=False)
    return made.stderr.strip() if made.returncode else None


class Hosts:
    """A cluster of hosts with addresses of their own."""

    def __init__(self) -> None:
        self._env = {**os.environ, "BESSEMER_NETNS": f"bsm{secrets.token_hex(2)}"}
        self._env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # A busy machine must not take a slow host for a dead one.
        self._env["RAY_health_check_timeout_ms"] = "3000"
        # The package travels with the submission; what the hosts have installed must not be used.
        self._env.pop("PYTHONPATH", None)
        self.directory = Path("/tmp") / self._env["BESSEMER_NETNS"]

    def __call__(self, *words: object) -> str:
        """Run the script."""
        command = [sys.executable, SCRIPT, *map(str, words)]
        # Its background processes keep what they inherit open: only the first output is waited for.
        done = subprocess.run(command, env=self._env, stdout=subprocess.PIPE, text=True, timeout=400, check=False)
        assert done.returncode == 0, f"hosts {words}: {done.stdout}"
        return done.stdout

    @property
    def settings(self) -> dict[str, str]:
        """Environment that points a client at the cluster."""
        return dict(re.findall(r"(\w+)=(\S+)", self("env")))

    def address(self, host: str) -> str:
        """A host's address."""
        return dict(line.split()[:2] for line in self("show").splitlines())[host]

    def client(self, *words: object, **more: str) -> subprocess.Popen[str]:
        """`bessemer ...` on this machine, as a client of the cluster, with more environment variables."""
        command = [sys.executable, "-m", "bessemer.cli", *map(str, words)]
        env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", **self.settings, **more}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    def bessemer(self, *words: object, code: int = 0) -> str:
        """As :meth:`client`, waited for; what it printed."""
        process = self.client(*words)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == code, output
        return output

    def processes(self, *hosts: str) -> list[psutil.Process]:
        """All processes of these hosts, or of all."""
        found = []
        for host in hosts or re.findall(r"^(\S+) ", self("show"), re.MULTILINE):
            space = f"{self.directory.name}-{host}"
            done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True)
            for pid in done.stdout.split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(int(pid)))
        return found


@contextlib.contextmanager
def network_hosts(*up: object) -> Iterator[Hosts]:
    """Hosts that are up meanwhile."""
    if (reason := why_not()) is not None:
        pytest.skip(f"no network namespaces: {reason}")
    hosts = Hosts()
    try:
        hosts("up", *up)
        yield hosts
    finally:
        hosts("down")


def wait_for_images(run: Path, count: int, hosts: Hosts, seconds: float = 400) -> None:
    for _ in range(int(seconds * 10)):
        if images_seen(run) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{images_seen(run)} images after {seconds} s: {hosts.bessemer('logs', run.name)}")


def resumptions(run: Path) -> list[tuple[int, int]]:
    """(workers, images) of each time that the run went on."""
    return [(r["workers"], r["nimg"]) for r in read_journal(run / "journal.jsonl") if r.get("event") == "resumed"]


def wait_for_workers(run: Path, resumed: int, workers: int, hosts: Hosts, seconds: float = 400) -> None:
    """Until the run has gone on so many times, the last time with so many workers, and has trained since."""
    for _ in range(int(seconds * 10)):
        found = resumptions(run)
        if len(found) >= resumed:
            assert found[resumed - 1][0] == workers
            if images_seen(run) > found[-1][1]:
                return
        time.sleep(0.1)
    raise AssertionError(f"{resumptions(run)} after {seconds} s: {hosts.bessemer('logs', run.name)}")


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Images seen -> losses."""
    records = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "metrics"]
    return {r["nimg"]: {k: v for k, v in r["values"].items() if k.startswith("loss/")} for r in records}
