"""A driver hears whether the processes of a group run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

from bessemer.orchestration import heartbeat
from bessemer.orchestration.heartbeat import Heartbeats, Point, reach_all, serve_at, serve_heartbeat

CONTEXT = multiprocessing.get_context("fork")


def beat(found: Connection) -> None:
    found.send(serve_heartbeat("127.0.0.1"))
    time.sleep(600)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[BaseProcess, Point]]]:
    """Two processes and where they are heard."""
    monkeypatch.setattr(heartbeat, "_BEAT_SECONDS", 0.05)
    made = []
    try:
        for _ in range(2):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=beat, args=(theirs,))
            process.start()
            made.append((process, ours))
        yield [(process, ours.recv()) for process, ours in made]
    finally:
        for process, _ in made:
            process.kill()
            process.join()


@pytest.fixture
def heartbeats(group: list[tuple[BaseProcess, Point]]) -> Iterator[Heartbeats]:
    heartbeats = Heartbeats(dict(enumerate(point for _, point in group)))
    assert not heartbeats.unreached
    yield heartbeats
    heartbeats.close()


def until(heartbeats: Heartbeats, looks: dict[int, int]) -> None:
    """Look, at leisure, until that many looks in a row have heard nothing."""
    end = time.monotonic() + 60
    while heartbeats.look() != looks:
        assert time.monotonic() < end
        time.sleep(1.0)


def test_a_process_that_hangs_is_silent_until_it_goes_on(
    group: list[tuple[BaseProcess, Point]], heartbeats: Heartbeats
) -> None:
    until(heartbeats, {})
    os.kill(group[1][0].pid or 0, signal.SIGSTOP)
    until(heartbeats, {1: 3})
    os.kill(group[1][0].pid or 0, signal.SIGCONT)
    until(heartbeats, {})


def test_a_process_that_ends_is_silent(group: list[tuple[BaseProcess, Point]], heartbeats: Heartbeats) -> None:
    until(heartbeats, {})
    group[0][0].kill()
    until(heartbeats, {0: 3})


def test_a_driver_that_slept_blames_nobody(group: list[tuple[BaseProcess, Point]], heartbeats: Heartbeats) -> None:
    """However long it slept, and they too, from which they have not woken yet: that is one look."""
    for process, _ in group:
        os.kill(process.pid or 0, signal.SIGSTOP)
    before = heartbeats.look()
    time.sleep(3.0)
    assert heartbeats.look() == {rank: before.get(rank, 0) + 1 for rank in (0, 1)}


def test_a_second_listener_takes_nothing_from_the_first(
    group: list[tuple[BaseProcess, Point]], heartbeats: Heartbeats
) -> None:
    second = Heartbeats(dict(enumerate(point for _, point in group)))
    until(second, {})
    until(heartbeats, {})
    second.close()
    until(heartbeats, {})


def test_a_broken_connection_is_made_anew() -> None:
    """As when something between forgets connections: a worker that lives is heard again."""
    with serve_at("127.0.0.1") as worker:
        heartbeats = Heartbeats({1: worker.getsockname()[:2]})
        for _ in range(2):
            connection, _ = worker.accept()
            connection.sendall(b".")
            until(heartbeats, {})
            connection.close()
            until(heartbeats, {1: 2})
        heartbeats.close()


def test_who_is_not_reached_is_named() -> None:
    with serve_at("127.0.0.1") as listening, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        points = {0: listening.getsockname()[:2], 3: closed.getsockname()}
        reached, unreached = reach_all(points)
    for connection in reached.values():
        connection.close()
    assert list(reached) == [0]
    assert unreached == {3: f"127.0.0.1:{points[3][1]}: Connection refused"}
