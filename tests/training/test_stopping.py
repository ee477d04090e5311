"""A worker is told to stop, or dies, or hangs: all workers end soon, and the run goes on as if nothing happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tests.training.forked import CONTEXT, start_group, wait_for_group
from tests.training.tiny_work import IMAGES, assert_same, events, train

from bessemer.training.checkpoint_files import complete_checkpoints, nimg_of
from bessemer.training.stopping import EXIT_STOPPED, StopRequest

ITERATIONS, PACE = 60, 0.02
NEVER = {"every_kimg": 1000.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    group = start_group(train, 2, root / "log", root, 1, ITERATIONS, NEVER)
    assert wait_for_group(group, 120) == [0, 0], (root / "log").read_text()
    return root


def disturb(root: Path, after: int, what: Callable[[list[BaseProcess]], None]) -> list[BaseProcess]:
    """Start a run, wait until it has trained `after` iterations, and do something to its workers."""
    seen = CONTEXT.Value("q", 0, lock=False)
    group = start_group(train, 2, root / "log", root, 1, ITERATIONS, NEVER, seen, PACE)
    deadline = time.monotonic() + 120
    while seen.value < after * IMAGES:
        assert all(p.is_alive() for p in group), (root / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    what(group)
    return group


def sent(*ranks: int, number: signal.Signals = signal.SIGTERM) -> Callable[[list[BaseProcess]], None]:
    def send(group: list[BaseProcess]) -> None:
        for rank in ranks:
            os.kill(group[rank].pid or 0, number)

    return send


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
def test_sigterm_writes_a_checkpoint_and_stops_all(tmp_path: Path, undisturbed: Path, ranks: tuple[int, ...]) -> None:
    group = disturb(tmp_path, 7, sent(*ranks))
    assert wait_for_group(group, 60) == [EXIT_STOPPED, EXIT_STOPPED], (tmp_path / "log").read_text()
    (stopped,) = events(tmp_path, "preempted")
    assert 7 * IMAGES <= stopped["nimg"] < ITERATIONS * IMAGES
    assert [nimg_of(p) for p in complete_checkpoints(tmp_path / "checkpoints")] == [stopped["nimg"]]
    group = start_group(train, 2, tmp_path / "log", tmp_path, 1, ITERATIONS, NEVER)
    assert wait_for_group(group, 60) == [0, 0], (tmp_path / "log").read_text()
    assert [r["nimg"] for r in events(tmp_path, "resumed")] == [stopped["nimg"]]
    assert_same(tmp_path, undisturbed)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_file_stops_workers_that_no_signal_reaches(tmp_path: Path) -> None:
    group = disturb(tmp_path, 3, lambda group: (tmp_path / ".stop").touch())
    assert wait_for_group(group, 60) == [EXIT_STOPPED, EXIT_STOPPED], (tmp_path / "log").read_text()
    assert events(tmp_path, "preempted")


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_worker_takes_the_other_down(tmp_path: Path, rank: int, number: signal.Signals) -> None:
    group = disturb(tmp_path, 3, sent(rank, number=number))
    other = group[1 - rank]
    try:
        other.join(30)
        assert other.exitcode == 1, (tmp_path / "log").read_text()
    finally:
        group[rank].kill()
        group[rank].join()


def test_looking_for_the_file_is_cheap_and_final(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "other", tmp_path / "stop")
    assert not stop()
    (tmp_path / "stop").touch()
    for _ in range(200):
        if stop():
            break
        time.sleep(0.02)
    assert stop()
    (tmp_path / "stop").unlink()
    assert stop()
