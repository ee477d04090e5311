"""Trainings of which all but one are frozen: short blocks of each in turn, on the same cores, in the same minutes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from bessemer.tracking.journal import read_entries

__all__ = ["Block", "Training"]

_CUT = 2
"""Steps of a block that do not count: the one that was frozen, and one that fills the caches again."""
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Block:
    """What a training did between two others' turns."""

    steps: list[float]
    """Seconds that each step took."""
    workers_cpu: float
    """CPU seconds of its workers per step."""
    others_cpu: float
    """CPU seconds per step of its other processes: the driver, and what starts and watches workers."""


class Training:
    """A training that logs every step, with all processes that belong to it.

    Args:
        command: that trains in `run`, and prints which processes its workers are in `run`/logs.
        run: its run directory.
        log: where its output goes.
        env: its environment.
    """

    def __init__(self, command: Sequence[str], run: Path, log: Path, env: dict[str, str]) -> None:
        self._run, self._log = run, log
        with log.open("wb") as output:  # a pipe that nobody reads would stop it
            self._process = psutil.Popen(list(command), stdout=output, stderr=output, env=env)
        self._times: list[float] = []
        self._offset = 0

    def warm_up(self, steps: int) -> None:
        """Let it make so many steps, then freeze it."""
        self._await(steps)
        self.freeze()

    def block(self, steps: int) -> Block:
        """Let it make so many steps that count, alone."""
        begin = self._seen() + _CUT
        self.thaw()
        self._await(begin)
        before = self._cpu()
        self._await(begin + steps)
        workers, others = (after - earlier for after, earlier in zip(self._cpu(), before, strict=True))
        made = self._seen() - begin
        self.freeze()
        times = self._times[begin - 1 : begin + steps]
        return Block([after - earlier for earlier, after in pairwise(times)], workers / made, others / made)

    def freeze(self) -> None:
        """Let none of its processes run."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def memory(self) -> int:
        """Bytes that its workers have now."""
        return sum(int(psutil.Process(pid).memory_info().rss) for pid in self._workers())

    def close(self) -> None:
        """End it as a person would, and by force if that takes too long."""
        everything = self._processes()
        self.thaw()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.terminate()
        for left in psutil.wait_procs(everything, timeout=60)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: int) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, number)

    def _workers(self) -> set[int]:
        logs = (file.read_text() for file in (self._run / "logs").glob("worker-*.log"))
        return {int(re.findall(r"worker \d+ of \d+, process (\d+)", log)[-1]) for log in logs}

    def _cpu(self) -> tuple[float, float]:
        """CPU seconds of its workers so far, and of everything else."""
        workers, sums = self._workers(), [0.0, 0.0]
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                sums[process.pid not in workers] += used.user + used.system
        return sums[0], sums[1]

    def _seen(self) -> int:
        for entry in read_entries(self._run / "journal.jsonl", self._offset):
            self._offset = entry.end
            if entry.record["kind"] == "metrics":
                self._times.append(entry.record["time"])
        return len(self._times)

    def _await(self, steps: int) -> None:
        end = time.monotonic() + _PATIENCE_SECONDS
        while self._seen() < steps:
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(f"{self._run}: made {self._seen()} of {steps} steps:\n{self._log.read_text()}")
            time.sleep(_LOOK_SECONDS)
