"""What it saves that a worker keeps the memory it frees, beside the C library's own ways.

BigGAN's `tiny32` preset on digits under torchrun, one worker of one thread, 32 images a slice. Whether the C library
gives memory back between iterations differs from process to process, so each side starts anew in each round: seconds
of a step, CPU seconds, and the memory that the worker has at the end. Six rounds take five minutes.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import alternate, finish, parse_options, ratio
from _turns import Training

from bessemer.data.packing.pack import pack

SIDES: dict[str, dict[str, str]] = {"kept": {}, "own": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}}
"""Environments. The second says what is so anyway, but any setting of a person's makes a worker leave all to it."""
JOB = """
name: allocator
system: {{name: biggan, preset: tiny32}}
data: {{path: {data}}}
training: {{total_kimg: 1000, batch_size: 32, slice_size: 32, log_every_kimg: 0.032}}
checkpoint: {{every_kimg: 1000}}
evaluation: {{metrics: [], every_kimg: 1000, grid: 2}}
tracking: {{mlflow: false}}
"""
COMMAND = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "1",
    "-m",
    "bessemer.orchestration.worker",
)


def main() -> int:
    """Measure, print, and return the exit code."""
    options = parse_options(__doc__, rounds="starts of each side (6)")
    steps = 2 if options.quick else 24
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        pack("digits", directory / "digits", size=32, mode="RGB", limit=200)
        job = directory / "job.yaml"
        job.write_text(JOB.format(data=directory / "digits"))

        def start(name: str) -> Callable[[], float]:
            def take() -> float:
                run = directory / f"{name}-{len(measured[name])}"
                words = [sys.executable, *COMMAND, str(job), "--run-dir", str(run)]
                env = {**os.environ, "OMP_NUM_THREADS": "1", **SIDES[name]}
                with contextlib.closing(Training(words, run, run.with_suffix(".log"), env)) as training:
                    training.warm_up(6)
                    block = training.block(steps)
                    measured[name].append({**asdict(block), "memory_mib": round(training.memory() / 2**20, 1)})
                return statistics.median(block.steps)

            return take

        rounds = options.rounds or (1 if options.quick else 6)
        seconds = alternate({name: start(name) for name in SIDES}, rounds, warm_up=0)
    cpu, memory = (
        {name: [row[field] for row in rows] for name, rows in measured.items()}
        for field in ("workers_cpu", "memory_mib")
    )
    found = [
        ratio("step_to_own_ways", seconds["kept"], seconds["own"], sure=True),
        ratio("cpu_to_own_ways", cpu["kept"], cpu["own"], sure=True),
        ratio("memory_to_own_ways", memory["kept"], memory["own"], sure=True),
    ]
    return finish(found, {"starts": measured}, options)


if __name__ == "__main__":
    sys.exit(main())
