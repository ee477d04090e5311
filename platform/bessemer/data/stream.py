"""Batches for training: the slices that one worker owns, read ahead and decoded in threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.data.dataset import ShardedDataset
from bessemer.data.order import ElasticOrder, random_words
from bessemer.systems.contract import Batch

__all__ = ["CACHE_LIMIT", "SliceStream"]

CACHE_LIMIT = 512 << 20
"""Decoded bytes up to which `cache="auto"` keeps a data set in memory, per worker."""

_KEEP = 2
"""Batches kept for being asked for again: several updates of one iteration see the same images."""


class SliceStream:
    """The real images of a run, as seen by one worker.

    What :meth:`batch` returns is a pure function of (data set, seed, batch size, slice size, slice index, nimg): it
    does not depend on which worker asks, on threads, on the cache, or on what was asked before.

    Args:
        dataset: to read from; stays the caller's to close.
        seed: of the run.
        batch_size: images per optimizer step over all workers.
        slice_size: images per slice; divides `batch_size`.
        slices: indices of the slices that this worker owns, in ``range(batch_size // slice_size)``.
        mirror: flip each image left-right with probability one half.
        threads: decoder threads that read ahead; 0 decodes in the calling thread.
        cache: `decoded` keeps every decoded image in memory, `none` does not, `auto` does below `CACHE_LIMIT`.

    Raises:
        DataError: the data set has fewer images than the batch has slices.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        *,
        seed: int,
        batch_size: int,
        slice_size: int,
        slices: Sequence[int],
        mirror: bool = False,
        threads: int = 1,
        cache: str = "auto",
    ):
        if batch_size % slice_size:
            raise ValueError(f"batch_size {batch_size} is no multiple of slice_size {slice_size}")
        lanes = batch_size // slice_size
        if any(not 0 <= index < lanes for index in slices):
            raise ValueError(f"slices {list(slices)} are not all in 0..{lanes - 1}")
        if cache not in ("auto", "none", "decoded"):
            raise ValueError(f"cache is {cache!r}; it is one of auto, none, decoded")
        self.dataset = dataset
        self.order = ElasticOrder(dataset.shard_counts, seed, lanes)
        self._seed = seed
        self._batch_size = batch_size
        self._slice_size = slice_size
        self._slices = tuple(slices)
        self._mirror = mirror
        size = len(dataset) * int(np.prod(dataset.shape))
        keep = cache == "decoded" or (cache == "auto" and size < CACHE_LIMIT)
        self._cache = _DecodedCache(dataset) if keep else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bessemer-data") if threads else None
        # Far enough ahead that every thread has a slice to work on.
        self._ahead = max(1, -(-threads // max(1, len(self._slices))))
        self._steps: OrderedDict[int, list[Future[Batch]]] = OrderedDict()

    def batch(self, nimg: int) -> list[Batch]:
        """The owned slices of the batch that starts at `nimg` images, in the order of `slices`.

        Args:
            nimg: real images seen so far over all workers.

        Returns:
            One `Batch` per owned slice, on the CPU. Shared with later calls for the same `nimg`: not to be
            changed in place.

        Raises:
            DataError: a sample of this batch is damaged.
        """
        step = nimg // self._batch_size
        wanted = self._submit(step)
        if self._pool is not None:
            for later in range(step + 1, step + 1 + self._ahead):
                self._submit(later)
        self._forget(step)
        return [future.result() for future in wanted]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._steps.clear()

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
        ids = self.order.ids(index, step * self._slice_size, self._slice_size)
        pixels = self.dataset.read(ids) if self._cache is None else self._cache.read(ids)
        if self._mirror:
            words = random_words(len(ids), self._seed, "mirror", step * self._batch_size, index)
            flip = (words >> np.uint64(63)).astype(bool)
            pixels[flip] = pixels[flip, :, :, ::-1]
        # NumPy frees the GIL here and, unlike torch, starts no threads of its own.
        images = pixels.astype(np.float32)
        images /= 127.5
        images -= 1.0
        return Batch(torch.from_numpy(images), torch.from_numpy(self.dataset.labels[ids]))


class _DecodedCache:
    """Decoded images in memory, filled as they are first read. Threads may fill the same image: same bytes."""

    def __init__(self, dataset: ShardedDataset):
        self._dataset = dataset
        self._images: NDArray[np.uint8] = np.empty((len(dataset), *dataset.shape), dtype=np.uint8)
        self._filled = np.zeros(len(dataset), dtype=bool)
        self._lock = threading.Lock()

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[N, C, H, W] uint8, a copy."""
        missing = ids[~self._filled[ids]]
        if len(missing):
            images = self._dataset.read(missing)
            with self._lock:
                self._images[missing] = images
                self._filled[missing] = True
        return self._images[ids]
