"""Damaged samples and what stands in for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bessemer.data.order import random_words
from bessemer.errors import DataError

__all__ = ["BadSample", "Quarantine"]

_CANDIDATES = 64


@dataclass(frozen=True)
class BadSample:
    """A damaged sample, as it was found."""

    number: int
    """Its id in the data set; keys in the shards are these numbers."""
    shard: str
    offset: int
    """Byte in the shard."""
    reason: str


class Quarantine:
    """Replaces damaged samples by others of their class, so that batches keep their size and their labels.

    Which sample stands in for another is a function of its number and of what is damaged, and so the same on every
    worker, for any number of workers, and after a restart.

    Args:
        limit: damaged samples at most; one more is an error.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._found: dict[int, BadSample] = {}
        self._new: list[BadSample] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def reason(self, number: int) -> str | None:
        """Why a sample cannot be read, if that is known."""
        found = self._found.get(number)
        return None if found is None else found.reason

    def add(self, sample: BadSample) -> None:
        """Note a damaged sample.

        Raises:
            DataError: it is one more than the limit.
        """
        with self._lock:
            if sample.number in self._found:
                return
            if len(self._found) >= self.limit:
                raise DataError(
                    f"{sample.shard}: sample {sample.number:08d} at byte {sample.offset} is damaged: {sample.reason}; "
                    f"with it there are more than data.max_bad_samples: {self.limit}; copy the shards again from where "
                    f"they were packed, or raise data.max_bad_samples"
                )
            self._found[sample.number] = sample
            self._new.append(sample)

    def take_new(self) -> list[BadSample]:
        """What was found since the last call."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def candidates(self, number: int, labels: NDArray[Any]) -> Iterator[int]:
        """Samples of the same class that may stand in for one, in a random order that depends on its number alone."""
        members = np.flatnonzero(labels == labels[number])
        for word in random_words(_CANDIDATES, 0, "substitute", number).tolist():
            candidate = int(members[word % len(members)])
            if candidate != number:
                yield candidate
