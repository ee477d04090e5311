"""What an evaluator beside a run costs it: seconds per block of images while it works, over those while it is frozen.

One worker of one thread trains BigGAN's `tiny32` preset on digits and publishes a snapshot after every block; a process
of one thread judges them by `kid_efflite0` without a pause, and is frozen (SIGSTOP) in two of three blocks. In one of
them a stranger computes convolutions instead: what that costs is the machine's doing, whose cores share caches and
memory. Goal: training keeps 0.97 of its speed beside the evaluator, on a machine where it does so beside the stranger;
elsewhere, it keeps beside the evaluator 0.97 of what the stranger leaves.
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


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A Python process of one thread."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )


STRANGER = """
import torch
torch.set_num_threads(1)
x, w = torch.randn(16, 32, 56, 56), torch.randn(32, 32, 3, 3)
with torch.no_grad():
    while True:
        torch.conv2d(x, w, padding=1)
"""
ORDER = ("frozen", "working", "stranger")


def block_ends(run: RunDirectory) -> list[float]:
    """When each block ended, by the journal."""
    return [r["time"] for r in read_journal(run.journal.path) if r["kind"] == "metrics"]


def is_judging(run: RunDirectory) -> bool:
    """Whether the evaluator has begun with its first snapshot."""
    log = run.path / "logs" / "evaluator.log"
    return log.exists() and "judging" in log.read_text()


def main() -> int:
    """Measure and print."""
    options = parse_options(__doc__, images="images of a block (default 1024)")
    block, rounds = (options.images or 256, 1) if options.quick else (options.images or 1024, 10)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        pack("digits", root / "digits", size=32, mode="RGB")
        # Some blocks pass before the evaluator begins, and the last one ends with a checkpoint.
        job = make_job(root / "digits", block, len(ORDER) * rounds + 6)
        run = RunDirectory.create(root, job, root / "run")
        stranger = start("-c", STRANGER)
        stranger.send_signal(signal.SIGSTOP)
        evaluator = start("-m", "bessemer.orchestration.evaluator", str(run.path))
        arguments = (str(run.path / "job.yaml"), "--run-dir", str(run.path))
        trainer = start("-m", "bessemer.orchestration.worker", *arguments)
        state: list[str] = []  # of the neighbours in each block
        try:
            while trainer.poll() is None:
                done = len(block_ends(run))
                if done == len(state) and is_judging(run):
                    state.append(ORDER[len(state) % len(ORDER)])
                    for name, process in (("working", evaluator), ("stranger", stranger)):
                        process.send_signal(signal.SIGCONT if state[-1] == name else signal.SIGSTOP)
                elif done > len(state):  # before it began to judge
                    state += ["starting"] * (done - len(state))
                time.sleep(0.02)
        finally:
            for process in (trainer, evaluator, stranger):
                process.kill()
                process.wait()
        ends = block_ends(run)
    seconds: dict[str, list[float]] = {name: [] for name in ORDER}
    for index in range(1, min(len(ends), len(state)) - 1):
        if state[index] in seconds:
            seconds[state[index]].append(ends[index] - ends[index - 1])
    rounds = min(map(len, seconds.values()))
    if rounds == 0:
        raise SystemExit("the run ended before the evaluator had begun; let it take longer (rounds)")
    working, frozen, strange = (seconds[name][:rounds] for name in ("working", "frozen", "stranger"))
    machine = ratio("beside/stranger", strange, frozen)
    shares = machine.value > GOAL
    found = [
        ratio("beside/step", working, frozen, None if shares else GOAL),
        machine,
        ratio("beside/step-to-stranger", working, strange, GOAL if shares else None),
    ]
    return finish(found, {"seconds": seconds, "block": block}, options)


if __name__ == "__main__":
    sys.exit(main())
