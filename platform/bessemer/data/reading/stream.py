"""Batches for training: the slices that one worker owns, read ahead and decoded in threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.data.order import ElasticOrder, random_words
from bessemer.data.reading.buffers import Buffers
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.prefetch import Prefetcher
from bessemer.data.reading.shard_cache import CachedShards
from bessemer.errors import DataError
from bessemer.systems.contract import Batch

__all__ = ["CACHE_LIMIT", "PixelBatch", "SliceStream"]

CACHE_LIMIT = 512 << 20
"""Decoded bytes up to which `cache="auto"` keeps a data set in memory, per worker."""

_KEEP = 2
"""Batches kept for being asked for again: several updates of one iteration see the same images."""


class PixelBatch(Batch):
    """A slice as the decoder left it: one byte per value, until it is on the device that trains.

    Args:
        pixels: [N, H, W, C] uint8.
        labels: [N] int64.
        mirrored: [N] bool, images to flip left-right; None for none of them.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mirrored: Tensor | None = None):
        self.__dict__.update(pixels=pixels, labels=labels, mirrored=mirrored)

    pixels: Tensor
    mirrored: Tensor | None

    @cached_property
    def images(self) -> Tensor:
        """[N, C, H, W], float32 in [-1, 1]."""
        return self._images(self.pixels.device, torch.contiguous_format)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        """The batch on `device`: bytes travel there, and become numbers there."""
        if device == self.pixels.device:
            return Batch(self.images.to(memory_format=memory_format), self.labels)
        return Batch(self._images(device, memory_format), self.labels.to(device, non_blocking=True))

    def _images(self, device: torch.device, memory_format: torch.memory_format) -> Tensor:
        pixels = self.pixels.to(device, non_blocking=True)
        if self.mirrored is not None:
            mirrored = self.mirrored.to(device, non_blocking=True)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
        # By a tensor: CUDA would multiply by a number's reciprocal, and white would not be 1.
        return images.div_(torch.full((), 127.5, device=device)).sub_(1.0)


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
        self.order = ElasticOrder(dataset.shard_counts, seed, lanes)
        self._seed = seed
        self._batch_size = batch_size
        self._slice_size = slice_size
        self._slices = tuple(slices)
        self._mirror = mirror
        channels, height, width = dataset.shape
        size = len(dataset) * channels * height * width
        keep = cache == "decoded" or (cache == "auto" and size < CACHE_LIMIT)
        self._cache = _DecodedCache(dataset) if keep else None
        self._buffers = Buffers((slice_size, height, width, channels), pinned=pinned)
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
            One `PixelBatch` per owned slice, on the CPU. Shared with later calls for the same `nimg`: not to be
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
        together = sum(shards.records[shard].bytes for shard in needed)
        if together > shards.cache.limit:
            raise DataError(
                f"data.cache_gb: {shards.cache.limit / 1e9:g} is too small: one worker reads from {len(needed)} shards "
                f"of {self.dataset.place} at a time, which have {together / 1e9:.3g} GB; raise it to twice that"
            )
        return Prefetcher(shards, self._upcoming, every=max(1, self.order.window // (8 * self._slice_size)))

    def _upcoming(self, step: int) -> list[int]:
        """Shards that hold the next window of images of each owned lane, those that are needed first before others."""
        first: dict[int, int] = {}
        for index in self._slices:
            ids = self.order.ids(index, step * self._slice_size, self.order.window)
            shards, at = np.unique(self.dataset.shards_of(ids), return_index=True)
            for shard, place in zip(shards.tolist(), at.tolist(), strict=True):
                first[shard] = min(place, first.get(shard, place))
        return sorted(first, key=lambda shard: first[shard])

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
        pixels = self._buffers.take()
        if self._cache is None:
            self.dataset.read_into(ids, pixels.numpy())
        else:
            self._cache.read_into(ids, pixels.numpy())
        mirrored = None
        if self._mirror:
            words = random_words(len(ids), self._seed, "mirror", step * self._batch_size, index)
            mirrored = torch.from_numpy((words >> np.uint64(63)).astype(bool))
        return PixelBatch(pixels, torch.from_numpy(self.dataset.labels_of(ids)), mirrored)


class _DecodedCache:
    """Decoded images in memory, filled as they are first read. Threads may fill the same image: same bytes."""

    def __init__(self, dataset: ShardedDataset):
        self._dataset = dataset
        channels, height, width = dataset.shape
        self._images: NDArray[np.uint8] = np.empty((len(dataset), height, width, channels), dtype=np.uint8)
        self._filled = np.zeros(len(dataset), dtype=bool)
        self._lock = threading.Lock()

    def read_into(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """[N, H, W, C] uint8, copied to `out`."""
        missing = ids[~self._filled[ids]]
        if len(missing):
            images = np.empty((len(missing), *self._images.shape[1:]), dtype=np.uint8)
            self._dataset.read_into(missing, images)
            with self._lock:
                self._images[missing] = images
                self._filled[missing] = True
        # Without a mode, take() goes through a buffer of its own.
        np.take(self._images, ids, axis=0, out=out, mode="clip")
