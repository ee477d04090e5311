"""Noticing that a worker hangs, long before a collective call gives up on it.

A worker that is killed closes its connections, and the others' collective calls fail within a second. One whose
machine freezes or swaps itself to death keeps them open: the others wait for `COLLECTIVE_TIMEOUT`, which must be
long, because waiting for the first worker to draw and write things is normal. So every worker counts in a thread, in
the key-value store that the group was made with, and watches the count of the next one.
"""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from bessemer.training.distributed import Workers, end_process

__all__ = ["PATIENCE_SECONDS", "watch_peers"]

PATIENCE_SECONDS = 20
"""A worker whose threads stand still this long is given up."""

_TICK_SECONDS = 1.0

_log = logging.getLogger(__name__)


def _own_connection() -> Any:
    """A connection of our own to the group's store, or None if it has no address (a file, a test).

    The group's own connection serves one thread at a time: a frozen server would block the main thread too.
    """
    store = _get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return None
    timeout = timedelta(seconds=PATIENCE_SECONDS)
    return TCPStore(store.host, store.port, is_master=False, timeout=timeout, wait_for_workers=False)


class _Watch:
    """Two threads: one talks to the store, which may block; the other only counts its own ticks.

    Ticks, not a clock: a worker that was frozen itself, or a machine that slept, must not blame the others.
    """

    def __init__(self, workers: Workers, store: Any, prefix: str, give_up: Callable[[str], None]) -> None:
        self._rank, self._next = workers.rank, (workers.rank + 1) % workers.size
        self._store, self._prefix, self._give_up = store, prefix, give_up
        self._stop = threading.Event()
        self._silent_ticks = 0
        """Since the last news of the other worker."""
        self._lost: str | None = None
        for work in (self._talk, self._count):
            threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()

    def _talk(self) -> None:
        own, other = (f"{self._prefix}/alive/{rank}" for rank in (self._rank, self._next))
        beats, heard = 0, b""
        while not self._stop.is_set():
            beats += 1
            try:
                self._store.set(own, str(beats))
                now = self._store.get(other) if self._store.check([other]) else b""
                if now != heard:
                    heard, self._silent_ticks = now, 0
                if self._store.check([f"{self._prefix}/lost"]):
                    self._lost = self._store.get(f"{self._prefix}/lost").decode()
            except RuntimeError:
                pass  # the store is gone, or silent: no news of the other
            self._stop.wait(_TICK_SECONDS)

    def _count(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            self._silent_ticks += 1
            if self._lost is None and self._silent_ticks < PATIENCE_SECONDS / _TICK_SECONDS:
                continue
            lost = self._lost or str(self._next)
            threading.Thread(target=self._tell, args=(lost,), daemon=True).start()
            if not self._stop.wait(_TICK_SECONDS):
                self._give_up(f"nothing was heard from worker {lost} for {PATIENCE_SECONDS} s, or from the store")
            return

    def _tell(self, lost: str) -> None:
        """Let the others know, who watch someone else. In a thread of its own, since the store may be what hangs."""
        self._store.set(f"{self._prefix}/lost", lost)

    def stop(self) -> None:
        self._stop.set()


def _end(why: str) -> None:
    _log.critical("%s; this worker ends, and the run goes on from its newest checkpoint", why)
    print(f"error: {why}; this worker ends", file=sys.stderr)
    end_process(1)


@contextmanager
def watch_peers(workers: Workers) -> Iterator[None]:
    """End this process when another worker hangs; meanwhile costs two threads that mostly sleep. Collective."""
    # torchrun's store outlives a group of workers: each group counts under a name of its own
    prefix = workers.from_first(f"bessemer/{uuid.uuid4().hex}")
    store = _own_connection() if workers.size > 1 else None
    watch = _Watch(workers, store, prefix, _end) if store is not None else None
    try:
        yield
    finally:
        if watch is not None:
            watch.stop()
