"""Chaos: a run of two workers is disturbed at twenty random points, and ends as if nothing had happened.

Each disturbance comes at a random iteration and a random moment within it, while checkpoints are written every other
iteration. After each, everything visible is verified: a half-written checkpoint must never be picked up.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tests.training.forked import CONTEXT, start_group, wait_for_group
from tests.training.tiny_work import IMAGES, assert_same, events, train

from bessemer.training.checkpoint_files import complete_checkpoints, nimg_of, verify_checkpoint
from bessemer.training.stopping import EXIT_STOPPED

STAGE, ITERATIONS, POINTS, SEED = 1, 150, 20, 20261121
CHECKPOINT = {"every_kimg": 2 * IMAGES / 1000, "keep_last": 3}
DAY = 24 * 3600.0


class Chaos:
    """One run, and what happens to it."""

    def __init__(self, root: Path, draws: random.Random) -> None:
        self.root, self.draws = root, draws
        self.seen = CONTEXT.Value("q", 0, lock=False)
        self.torn: set[str] = set()
        self.interrupted = 0  # saves that a disturbance cut short
        self.clock_shift = 0.0
        self.group: list[BaseProcess] = []

    @property
    def checkpoints(self) -> list[Path]:
        return complete_checkpoints(self.root / "checkpoints")

    def start(self) -> None:
        self.seen.value = -1
        self.group = start_group(
            train, 2, self.root / "log", self.root, STAGE, ITERATIONS, CHECKPOINT, self.seen, 0.0, self.clock_shift
        )

    def wait(self, iterations: int) -> None:
        """Until the run has trained so many iterations since it was started, and a moment longer."""
        deadline = time.monotonic() + 60
        while self.seen.value < 0:
            self.still_there(deadline)
        goal = min(self.seen.value + iterations * IMAGES, (ITERATIONS - 4) * IMAGES)
        while self.seen.value < goal:
            self.still_there(deadline)
        time.sleep(self.draws.uniform(0, 0.03))

    def still_there(self, deadline: float) -> None:
        assert all(p.is_alive() for p in self.group), (self.root / "log").read_text()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.001)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.group[rank].pid or 0, number)

    def ended(self) -> list[int | None]:
        return wait_for_group(self.group, 60)

    # What can happen. Each ends with no worker left, or with a run that is as sound as before.

    def kill_one(self) -> None:
        rank = self.draws.randrange(2)
        self.signal(signal.SIGKILL, rank)
        assert self.ended()[1 - rank] == 1

    def kill_all(self) -> None:
        self.signal(signal.SIGKILL, 0, 1)
        self.ended()

    def stop(self) -> None:
        self.signal(signal.SIGTERM, *self.draws.choice([(0,), (1,), (0, 1)]))
        assert self.ended() == [EXIT_STOPPED, EXIT_STOPPED], (self.root / "log").read_text()
        assert nimg_of(self.checkpoints[-1]) == events(self.root, "preempted")[-1]["nimg"]

    def fill_the_disk(self) -> None:
        """No file of one worker may grow beyond its first bytes for some iterations; then all is killed."""
        failed = len(events(self.root, "checkpoint_failed"))
        pid = self.group[1].pid or 0
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (self.draws.randrange(3000), hard))
        deadline = time.monotonic() + 60
        while len(events(self.root, "checkpoint_failed")) == failed and self.seen.value < (ITERATIONS - 4) * IMAGES:
            self.still_there(deadline)
        self.kill_all()

    def tear(self) -> None:
        """The machine loses power, and with it the end of a file of the newest checkpoint."""
        self.kill_all()
        if self.checkpoints[1:]:
            newest = self.checkpoints[-1]
            file = self.draws.choice(sorted(newest.iterdir()))
            os.truncate(file, self.draws.randrange(file.stat().st_size))
            self.torn.add(newest.name)

    def turn_the_clock(self) -> None:
        """Times of files and of the next workers lie days away."""
        self.kill_all()
        for path in (self.root / "checkpoints").rglob("*"):
            shift = self.draws.uniform(-300, 300) * DAY
            os.utime(path, (time.time() + shift, time.time() + shift))
        self.clock_shift = self.draws.uniform(-300, 300) * DAY

    def nothing_half_written(self) -> None:
        self.interrupted += bool(list((self.root / "checkpoints").glob(".kimg-*")))
        for path in self.checkpoints:
            if path.name not in self.torn:
                verify_checkpoint(path)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_twenty_disturbances_change_nothing(tmp_path: Path) -> None:
    quiet, root = tmp_path / "quiet", tmp_path / "run"
    for directory in (quiet, root):
        directory.mkdir()
    group = start_group(train, 2, quiet / "log", quiet, STAGE, ITERATIONS, CHECKPOINT)
    assert wait_for_group(group, 120) == [0, 0], (quiet / "log").read_text()

    chaos = Chaos(root, random.Random(SEED))
    kinds: list[Callable[[], None]] = [
        chaos.kill_one,
        chaos.kill_all,
        chaos.stop,
        chaos.fill_the_disk,
        chaos.tear,
        chaos.turn_the_clock,
    ]
    plan = [*kinds * 3, chaos.kill_one, chaos.tear]
    assert len(plan) == POINTS
    chaos.draws.shuffle(plan)
    for disturb in plan:
        chaos.start()
        chaos.wait(chaos.draws.randrange(3, 16))
        disturb()
        chaos.nothing_half_written()
    chaos.start()
    assert chaos.ended() == [0, 0], (root / "log").read_text()
    chaos.nothing_half_written()
    assert_same(root, quiet)

    resumed = [r["checkpoint"] for r in events(root, "resumed")]
    assert len(resumed) >= POINTS - 2  # the first may come before the first checkpoint
    skipped = {r["reason"] for r in events(root, "checkpoint_skipped")}
    assert all(any(name in reason for reason in skipped) for name in chaos.torn)
    assert len(chaos.torn) >= 3
    assert chaos.interrupted >= 1
    assert len(events(root, "checkpoint_failed")) >= 3
    assert len(events(root, "preempted")) == 3
