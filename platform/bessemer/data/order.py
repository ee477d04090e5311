"""The elastic order: which image comes when, as a pure function of (seed, position).

Every slice of the global batch reads its own lane. Workers own whole slices, so any number of workers reads the
same global batches, and a resumed run needs one integer to go on.

Random numbers are raw words of PCG64, whose stream NumPy guarantees for ever (NEP 19); the streams of
`Generator.permutation` and its like may change with a new NumPy and would change a resumed run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bessemer.errors import DataError

__all__ = ["ElasticOrder", "permutation", "random_words"]

WHOLE = 1 << 17
"""Up to this many images an epoch is one permutation of all of them; above, shards and windows keep reads local."""


def random_words(count: int, seed: int, *purpose: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit words, a pure function of `seed` and `purpose` on every machine."""
    name = "|".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in (int(seed), *purpose))
    entropy = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    words: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return words


def permutation(count: int, seed: int, *purpose: int | str) -> NDArray[np.int64]:
    """A random permutation of ``range(count)``, a pure function of `seed` and `purpose`."""
    return np.argsort(random_words(count, seed, *purpose), kind="stable").astype(np.int64, copy=False)


class ElasticOrder:
    """Endless order of the images of a data set, cut into lanes; each image comes at most once per epoch.

    An epoch has ``lanes * lane_length`` images; the remainder, fewer than `lanes`, is left out and is another one
    in every epoch. Small sets are permuted whole. In larger ones the shards are permuted and laid end to end, the
    sequence is rotated by a random amount, cut into equal lanes, and shuffled in windows within each lane, so that
    a slice reads from few shards at a time.

    Args:
        shard_counts: samples of each shard; ids number the samples of all shards in order.
        seed: of the run.
        lanes: number of slices in the global batch.
        window: samples that are shuffled together within a lane of a large set.
        whole: largest set that is permuted whole.

    Raises:
        DataError: the set has fewer images than there are lanes.
    """

    def __init__(self, shard_counts: Sequence[int], seed: int, lanes: int, window: int = 4096, *, whole: int = WHOLE):
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes and window must be positive, got lanes={lanes}, window={window}")
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self._counts = np.asarray(shard_counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self.samples = int(self._counts.sum())
        if self.samples < lanes:
            raise DataError(
                f"the data set has {self.samples} images but the batch has {lanes} slices; every slice needs at least "
                f"one image of its own: pack more images, or raise training.slice_size (fewer slices)"
            )
        self.lane_length = self.samples // lanes
        """Images of one lane in one epoch."""
        self._is_whole = self.samples <= whole
        # Memory of pure functions; lru_cache may be called from several threads.
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)
        self._sequence = lru_cache(maxsize=4)(self._draw_sequence)
        self._window = lru_cache(maxsize=256)(self._draw_window)

    def ids(self, lane: int, start: int, count: int) -> NDArray[np.int64]:
        """Ids at positions ``start .. start + count`` of a lane.

        Args:
            lane: slice index, below `lanes`.
            start: position in the lane over all epochs: ``start // lane_length`` is the epoch.
            count: images wanted; the request may cross the ends of epochs.

        Returns:
            [count] int64.
        """
        if not 0 <= lane < self.lanes or start < 0 or count < 0:
            raise ValueError(f"no lane {lane} of {self.lanes} at {start} (+{count})")
        parts: list[NDArray[np.int64]] = []
        stop = start + count
        while start < stop:
            epoch, position = divmod(start, self.lane_length)
            part = self._run(epoch, lane, position)[: stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _run(self, epoch: int, lane: int, position: int) -> NDArray[np.int64]:
        """At least one and at most all ids that follow `position` in the lane within this epoch."""
        if self._is_whole:
            begin = lane * self.lane_length
            return self._epoch(epoch)[begin + position : begin + self.lane_length]
        window, within = divmod(position, self.window)
        return self._window(epoch, lane, window)[within:]

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.samples, self.seed, "order", epoch)

    def _draw_sequence(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Shards of the epoch in their order, the position at which each ends, and the rotation."""
        shards = permutation(len(self._counts), self.seed, "order/shards", epoch)
        ends = np.cumsum(self._counts[shards])
        rotation = int(random_words(1, self.seed, "order/rotation", epoch)[0]) % self.samples
        return shards, ends, rotation

    def _draw_window(self, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        shards, ends, rotation = self._sequence(epoch)
        begin = window * self.window
        end = min(begin + self.window, self.lane_length)
        positions = (np.arange(begin, end) + lane * self.lane_length + rotation) % self.samples
        place = np.searchsorted(ends, positions, side="right")
        shard = shards[place]
        ids = self._starts[shard] + positions - (ends[place] - self._counts[shard])
        return ids[permutation(len(ids), self.seed, "order/window", epoch, lane, window)]
