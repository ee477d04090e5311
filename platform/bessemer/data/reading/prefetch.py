"""Shards fetched before they are needed, in the order in which the run will need them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from bessemer.data.reading.shard_cache import CachedShards
from bessemer.errors import BessemerError

__all__ = ["Prefetcher"]

_log = logging.getLogger(__name__)


class Prefetcher:
    """Threads that fetch shards ahead of the cursor. What they cannot fetch, the reader fetches, and reports.

    Args:
        shards: where to fetch them.
        upcoming: step -> shards that the workers of this node will need from there on, soonest first, and whether this
            worker will. What only others need is theirs to fetch, but takes room.
        every: steps after which to look anew what is needed.
        threads: downloads at the same time.
    """

    def __init__(
        self, shards: CachedShards, upcoming: Callable[[int], list[tuple[int, bool]]], *, every: int, threads: int = 2
    ):
        self._shards = shards
        self._upcoming = upcoming
        self._every = every
        self._planned: int | None = None  # step of the newest plan
        self._asked: int | None = None  # step to plan from, until a thread does
        self._waiting: deque[int] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name="bessemer-prefetch", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def moved_to(self, step: int) -> None:
        """Tell where the run is."""
        if self._planned is None or not self._planned <= step < self._planned + self._every:
            with self._changed:
                self._planned = self._asked = step
                self._changed.notify()

    def close(self) -> None:
        """Fetch nothing more. A download that is under way goes on until the process ends, or it does."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=0.5)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._asked is None and not self._waiting:
                    self._changed.wait()
                if self._closed:
                    return
                step, self._asked = self._asked, None
                shard = self._waiting.popleft() if step is None else None
            if step is not None:
                plan = self._plan(step)
                with self._changed:
                    self._waiting = deque(plan)
                    self._changed.notify_all()
            elif shard is not None:
                try:
                    self._shards.fetch(shard)
                except BessemerError as error:
                    _log.warning("prefetching failed, and is tried again when the shard is needed: %s", error)

    def _plan(self, step: int) -> list[int]:
        """Shards to fetch, soonest first: half the cache at most for all of the node, so that what is read stays."""
        cache = self._shards.cache
        room = cache.limit // 2
        plan: list[int] = []
        for place, (shard, is_own) in enumerate(self._upcoming(step)):
            record = self._shards.records[shard]
            room -= record.bytes
            if room < 0 and place > 0:  # the first is needed however large it is
                break
            if not is_own:
                continue
            if cache.holds(record):
                cache.touch(record)  # it must not make room for what is needed later
            else:
                plan.append(shard)
        return plan
