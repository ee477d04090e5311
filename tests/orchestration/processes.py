"""Runs in processes of their own, and looking at how far they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bessemer.data.packing.pack import pack
from bessemer.tracking.journal import read_journal

__all__ = ["bessemer", "digits_job", "images_seen", "torchrun", "wait_for", "worker_pid"]


def digits_job(root: Path, text: str) -> Path:
    """A job file at `root` whose data set, DATA in its text, is 200 digits."""
    pack("digits", root / "digits", size=32, mode="RGB", limit=20)
    path = root / "job.yaml"
    path.write_text(text.replace("DATA", str(root / "digits")))
    return path


def torchrun(job: Path, run: Path, workers: int = 2, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += ["-m", "bessemer.orchestration.worker", str(job), "--run-dir", str(run), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def bessemer(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from bessemer.cli import main; main()", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def wait_for(what: str, check: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    for _ in range(int(seconds / 0.05)):
        if check():
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.communicate()[0]}")
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"waited {seconds} s for {what}")


def images_seen(run: Path) -> int:
    return max((r["nimg"] for r in read_journal(run / "journal.jsonl") if r["kind"] == "metrics"), default=0)


def worker_pid(run: Path, rank: int) -> int:
    """Process of the newest worker `rank`, as its log says."""
    found = re.findall(rf"worker {rank} of 2, process (\d+)", (run / "logs" / f"worker-{rank}.log").read_text())
    return int(found[-1])
