"""Open shards: descriptors to `pread` from, few at a time, shared by threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bessemer.errors import DataError

__all__ = ["LocalShards"]

_OPEN_SHARDS = 128


@dataclass
class _Handle:
    descriptor: int
    users: int = 0
    """Threads that read from it."""
    retired: bool = False
    """Nobody finds it any more; its last user closes it."""


class LocalShards:
    """Shards in directories of this machine: descriptors of those most recently read, few at a time."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Handle] = OrderedDict()  # by shard, oldest use first

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        """A descriptor that stays open within the block.

        Raises:
            DataError: the shard cannot be opened.
        """
        handle = self._acquire(shard)
        try:
            yield handle.descriptor
        finally:
            with self._lock:
                self._release(handle)
                self._close_unused(keep=_OPEN_SHARDS)

    def repair(self, shard: int) -> bool:
        """Open a shard with a damaged sample anew at its next use; whether reading it again makes sense now."""
        with self._lock:
            self._retire(shard)
        return False

    def close(self) -> None:
        """Close all that no thread reads from."""
        with self._lock:
            self._close_unused(keep=0)

    def _acquire(self, shard: int) -> _Handle:
        try:
            with self._lock:
                return self._use(shard)
        except OSError as error:
            raise DataError(
                f"{self._paths[shard]} cannot be opened: {error.strerror}; put the shard back, or pack the "
                f"data set anew"
            ) from None

    def _use(self, shard: int) -> _Handle:
        """The handle of a shard with one user more."""
        if shard not in self._open:
            self._open[shard] = _Handle(os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC))
        handle = self._open[shard]
        self._open.move_to_end(shard)
        handle.users += 1
        if handle.users == 1:
            self._first_use(handle)
        return handle

    def _release(self, handle: _Handle) -> None:
        handle.users -= 1
        if handle.users == 0:
            self._last_use(handle)
            if handle.retired:
                os.close(handle.descriptor)

    def _first_use(self, handle: _Handle) -> None:
        """Called when a thread begins to read where none did."""

    def _last_use(self, handle: _Handle) -> None:
        """Called when no thread reads any more."""

    def _retire(self, shard: int) -> None:
        """Let the next use open the shard anew."""
        handle = self._open.pop(shard, None)
        if handle is not None:
            handle.retired = True
            if handle.users == 0:
                os.close(handle.descriptor)

    def _close_unused(self, keep: int) -> None:
        for shard in [shard for shard, handle in self._open.items() if not handle.users]:
            if len(self._open) <= keep:
                return
            self._retire(shard)
