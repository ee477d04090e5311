"""Open shards: descriptors to `pread` from, few at a time, shared by threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from bessemer.errors import DataError

__all__ = ["LocalShards", "Shards"]

_OPEN_SHARDS = 128


class Shards(Protocol):
    """The shards of one data set, by number."""

    def opened(self, shard: int) -> AbstractContextManager[int]:
        """A descriptor of the whole shard that stays open within the block."""

    def close(self) -> None:
        """Close all that no thread reads from."""


class LocalShards:
    """Shards in directories of this machine: descriptors of those most recently read, few at a time."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, oldest use first
        self._users: dict[int, int] = {}  # shard -> threads that read from it

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        """A descriptor that stays open within the block."""
        with self._lock:
            if shard not in self._open:
                try:
                    self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise DataError(
                        f"{self._paths[shard]} cannot be opened: {error.strerror}; put the shard back, or pack the "
                        f"data set anew"
                    ) from None
            self._open.move_to_end(shard)
            self._users[shard] = self._users.get(shard, 0) + 1
            descriptor = self._open[shard]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[shard] -= 1
                self._close_unused(keep=_OPEN_SHARDS)

    def close(self) -> None:
        """Close all that no thread reads from."""
        with self._lock:
            self._close_unused(keep=0)

    def _close_unused(self, keep: int) -> None:
        for shard in [shard for shard in self._open if not self._users.get(shard)]:
            if len(self._open) <= keep:
                return
            os.close(self._open.pop(shard))
