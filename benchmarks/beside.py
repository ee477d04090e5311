"""What an evaluator beside a run costs it: seconds per block of images while it works, over those while it is frozen.

One worker of one thread trains BigGAN's `tiny32` preset on digits and publishes a snapshot after every block; a process
of one thread judges them by `kid_efflite0` without a pause, and is frozen (SIGSTOP) in every second block. Goal:
training keeps 0.97 of its speed where the evaluator has a core of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import finish, parse_options, ratio

from bessemer.data.packing.pack import pack
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.tracking.journal import read_journal

BATCH = 32
GOAL = 1 / 0.97


def make_job(data: Path, block: int, blocks: int) -> JobSpec:
    """A run of `blocks` blocks of `block` images; what is judged takes longer than a block."""
    every = block / 1000
    return JobSpec.model_validate(
        {
            "name": "beside",
            "system": {"name": "biggan", "preset": "tiny32"},
            "data": {"path": str(data)},
            "training": {
                "total_kimg": every * blocks,
                "batch_size": BATCH,
                "slice_size": BATCH,
                "log_every_kimg": every,
            },
            "evaluation": {"beside": True, "metrics": ["kid_efflite0"], "samples": 1000, "every_kimg": every},
            "checkpoint": {"every_kimg": every * blocks},
        }
    )


def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )


def block_ends(run: RunDirectory) -> list[float]:
    """When each block ended, by the journal."""
    return [r["time"] for r in read_journal(run.journal.path) if r["kind"] == "metrics"]


def is_judging(run: RunDirectory) -> bool:
    """Whether the evaluator has begun with its first snapshot."""
    log = run.path / "logs" / "evaluator.log"
    return log.exists() and "judging" in log.read_text()


def main() -> int:
    """Measure and print."""
    options = parse_options(__doc__)
    block, rounds = (256, 2) if options.quick else (1024, 12)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        pack("digits", root / "digits", size=32, mode="RGB")
        # Two more blocks: the first one warms up, and the last one ends with a checkpoint.
        job = make_job(root / "digits", block, 2 * rounds + 2)
        run = RunDirectory.create(root, job, root / "run")
        trainer = start("bessemer.orchestration.worker", str(run.path / "job.yaml"), "--run-dir", str(run.path))
        evaluator = start("bessemer.orchestration.evaluator", str(run.path))
        state: list[str] = []  # of the evaluator in each block
        try:
            while trainer.poll() is None:
                done = len(block_ends(run))
                if done == len(state) and is_judging(run):
                    works = len(state) % 2 == 1
                    evaluator.send_signal(signal.SIGCONT if works else signal.SIGSTOP)
                    state.append("working" if works else "frozen")
                elif done > len(state):  # before it began to judge
                    state += ["starting"] * (done - len(state))
                time.sleep(0.02)
        finally:
            for process in (trainer, evaluator):
                process.kill()
                process.wait()
        ends = block_ends(run)
    seconds: dict[str, list[float]] = {"working": [], "frozen": []}
    for index in range(1, min(len(ends), len(state)) - 1):
        if state[index] in seconds:
            seconds[state[index]].append(ends[index] - ends[index - 1])
    pairs = min(map(len, seconds.values()))
    if pairs == 0:
        raise SystemExit("the run ended before the evaluator had begun; let it take longer (rounds)")
    working, frozen = (seconds[name][:pairs] for name in ("working", "frozen"))
    return finish([ratio("beside/step", working, frozen, GOAL)], {"seconds": seconds, "block": block}, options)


if __name__ == "__main__":
    sys.exit(main())
