"""Batches for training: the slices that one worker owns, read ahead and decoded in threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.data.fields import FieldRecord
from bessemer.data.order import ElasticOrder, random_words
from bessemer.data.reading.batches import RawBatch
from bessemer.data.reading.buffers import Buffers
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.prefetch import Prefetcher
from bessemer.data.reading.shard_cache import CachedShards
from bessemer.errors import DataError
from bessemer.systems.contract import Batch

__all__ = ["CACHE_LIMIT", "SliceStream"]

CACHE_LIMIT = 512 << 20
"""Decoded bytes up to which `cache="auto"` keeps a data set in memory, per worker."""

_KEEP = 2
"""Batches kept for being asked for again: several updates of one iteration see the same images."""


@dataclass(frozen=True)
class _Reading:
    """What is read in one order: the samples of a data set, or those of one of two domains."""

    order: ElasticOrder
    first: int
    """Id of its first sample."""
    names: tuple[str, ...]
    """Fields of the batch that they make."""


class SliceStream:
    """The real samples of a run, as seen by one worker.

    What :meth:`batch` returns is a pure function of (data set, seed, batch size, slice size, slice index, nimg): it
    does not depend on which worker asks, on threads, on the cache, or on what was asked before. Of two domains each has
    an order, and epochs, of its own.

    Args:
        dataset: to read from; stays the caller's to close.
        seed: of the run.
        batch_size: images per optimizer step over all workers.
        slice_size: images per slice; divides `batch_size`.
        slices: indices of the slices that this worker owns, in ``range(batch_size // slice_size)``.
        node_slices: those that the workers of this node own together, who share its cache of remote shards; by default
            those of this worker.
        mirror: flip each image left-right with probability one half; both of a pair alike, and all frames of a clip.
        threads: decoder threads that read ahead; 0 decodes in the calling thread.
        cache: `decoded` keeps every decoded sample in memory, `none` does not, `auto` does below `CACHE_LIMIT`.
        pinned: decode into page-locked memory, for copies to a GPU that the CPU does not wait for.

    Raises:
        DataError: the data set has fewer images than the batch has slices, or the node's cache of remote shards cannot
            hold what is read at the same time.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        *,
        seed: int,
        batch_size: int,
        slice_size: int,
        slices: Sequence[int],
        node_slices: Sequence[int] | None = None,
        mirror: bool = False,
        threads: int = 1,
        cache: str = "auto",
        pinned: bool = False,
    ):
        if batch_size % slice_size:
            raise ValueError(f"batch_size {batch_size} is no multiple of slice_size {slice_size}")
        lanes = batch_size // slice_size
        if any(not 0 <= index < lanes for index in slices):
            raise ValueError(f"slices {list(slices)} are not all in 0..{lanes - 1}")
        if cache not in ("auto", "none", "decoded"):
            raise ValueError(f"cache is {cache!r}; it is one of auto, none, decoded")
        self.dataset = dataset
        self._readings = _readings(dataset, seed, lanes)
        self.order = self._readings[0].order
        self._seed = seed
        self._batch_size = batch_size
        self._slice_size = slice_size
        self._slices = tuple(slices)
        self._node_slices = self._slices if node_slices is None else tuple(node_slices)
        self._mirror = mirror
        keep = cache == "decoded" or (cache == "auto" and dataset.manifest.decoded_bytes < CACHE_LIMIT)
        self._cache = _DecodedCache(dataset) if keep else None
        self._records: dict[str, FieldRecord] = {one.name: one for one in dataset.manifest.batch_fields}
        self._buffers = {
            name: Buffers((slice_size, *one.stored_shape), one.stored_dtype, pinned=pinned)
            for name, one in self._records.items()
        }
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bessemer-data") if threads else None
        # Far enough ahead that every thread has a slice to work on.
        self._ahead = max(1, -(-threads // max(1, len(self._slices))))
        self._steps: OrderedDict[int, list[Future[Batch]]] = OrderedDict()
        self._prefetcher = self._prefetch(dataset.shards) if isinstance(dataset.shards, CachedShards) else None

    def batch(self, nimg: int) -> list[Batch]:
        """The owned slices of the batch that starts at `nimg` images, in the order of `slices`.

        Args:
            nimg: real images seen so far over all workers.

        Returns:
            One `RawBatch` per owned slice, on the CPU. Shared with later calls for the same `nimg`: not to be
            changed in place.

        Raises:
            DataError: a sample of this batch is damaged.
        """
        step = nimg // self._batch_size
        if self._prefetcher is not None:
            self._prefetcher.moved_to(step)
        wanted = self._submit(step)
        if self._pool is not None:
            for later in range(step + 1, step + 1 + self._ahead):
                self._submit(later)
        self._forget(step)
        return [future.result() for future in wanted]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()

    def _prefetch(self, shards: CachedShards) -> Prefetcher:
        needed = self._upcoming(0)
        together = sum(shards.records[shard].bytes for shard, _ in needed)
        if together > shards.cache.limit:
            raise DataError(
                f"data.cache_gb: {shards.cache.limit / 1e9:g} is too small: a node reads from {len(needed)} shards of "
                f"{self.dataset.place} at a time, which have {together / 1e9:.3g} GB; raise it to twice that"
            )
        return Prefetcher(shards, self._upcoming, every=max(1, self.order.window // (8 * self._slice_size)))

    def _upcoming(self, step: int) -> list[tuple[int, bool]]:
        """Shards that hold the next window of images of each of the node's lanes, and whether this worker reads them.

        Those that are needed first come before others.
        """
        first: dict[int, int] = {}
        own: set[int] = set()
        for reading in self._readings:
            for index in self._node_slices:
                ids = reading.first + reading.order.ids(index, step * self._slice_size, self.order.window)
                shards, at = np.unique(self.dataset.shards_of(ids), return_index=True)
                for shard, place in zip(shards.tolist(), at.tolist(), strict=True):
                    first[shard] = min(place, first.get(shard, place))
                if index in self._slices:
                    own.update(shards.tolist())
        return [(shard, shard in own) for shard in sorted(first, key=lambda shard: first[shard])]

    def _submit(self, step: int) -> list[Future[Batch]]:
        if step in self._steps:
            return self._steps[step]
        futures: list[Future[Batch]] = []
        for index in self._slices:
            if self._pool is not None:
                futures.append(self._pool.submit(self._load, step, index))
            else:
                done: Future[Batch] = Future()
                done.set_result(self._load(step, index))
                futures.append(done)
        self._steps[step] = futures
        return futures

    def _forget(self, step: int) -> None:
        """Drop batches that are neither the last ones asked for nor the next ones."""
        self._steps.move_to_end(step)
        asked = [other for other in self._steps if not step < other <= step + self._ahead]
        for old in asked[:-_KEEP]:
            for future in self._steps.pop(old):
                future.cancel()

    def _load(self, step: int, index: int) -> Batch:
        raw: dict[str, torch.Tensor] = {}
        mirrored: dict[str, torch.Tensor] = {}
        labels = torch.zeros(self._slice_size, dtype=torch.int64)
        for reading in self._readings:
            ids = reading.first + reading.order.ids(index, step * self._slice_size, self._slice_size)
            taken = {name: self._buffers[name].take() for name in reading.names}
            arrays = [buffer.numpy() for buffer in taken.values()]
            if self._cache is None:
                self.dataset.read_into(ids, *arrays)
            else:
                self._cache.read_into(ids, *arrays)
            raw |= taken
            if self._mirror:
                purpose = "mirror" if reading is self._readings[0] else f"mirror/{reading.names[0]}"
                words = random_words(len(ids), self._seed, purpose, step * self._batch_size, index)
                mirrored |= dict.fromkeys(reading.names, torch.from_numpy((words >> np.uint64(63)).astype(bool)))
            if len(self._readings) == 1:
                labels = torch.from_numpy(self.dataset.labels_of(ids))
        return RawBatch(raw, labels, self._records, mirrored)


def _readings(dataset: ShardedDataset, seed: int, lanes: int) -> list[_Reading]:
    """One order of all samples, or one for each of two domains."""
    names = tuple(one.name for one in dataset.manifest.batch_fields)
    counts = dataset.shard_counts
    if dataset.manifest.kind != "domains":
        return [_Reading(ElasticOrder(counts, seed, lanes), 0, names)]
    first = dataset.manifest.class_counts[0]
    split = 1 + list(accumulate(counts)).index(first)
    other_seed = int(random_words(1, seed, "order", names[1])[0])
    return [
        _Reading(ElasticOrder(counts[:split], seed, lanes), 0, names[:1]),
        _Reading(ElasticOrder(counts[split:], other_seed, lanes), first, names[1:]),
    ]


class _DecodedCache:
    """Decoded samples in memory, filled as they are first read. Threads may fill the same sample: same bytes."""

    def __init__(self, dataset: ShardedDataset):
        self._dataset = dataset
        self._fields: list[NDArray[Any]] = [
            np.empty((len(dataset), *one.stored_shape), dtype=one.stored_dtype) for one in dataset.fields
        ]
        self._filled = np.zeros(len(dataset), dtype=bool)
        self._lock = threading.Lock()

    def read_into(self, ids: NDArray[np.int64], *out: NDArray[Any]) -> None:
        """[N, *stored_shape] of each field, copied to `out`."""
        missing = ids[~self._filled[ids]]
        if len(missing):
            read = [np.empty((len(missing), *kept.shape[1:]), dtype=kept.dtype) for kept in self._fields]
            self._dataset.read_into(missing, *read)
            with self._lock:
                for kept, values in zip(self._fields, read, strict=True):
                    kept[missing] = values
                self._filled[missing] = True
        for kept, into in zip(self._fields, out, strict=True):
            # Without a mode, take() goes through a buffer of its own.
            np.take(kept, ids, axis=0, out=into, mode="clip")
