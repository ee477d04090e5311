"""What a data set is like: balance, sizes, pixel statistics, duplicates, and what of it ruins runs."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bessemer.data.index import Index
from bessemer.data.manifest import Manifest
from bessemer.data.order import permutation
from bessemer.data.reading.dataset import ShardedDataset, read_index

__all__ = ["Examination", "examine", "sample_images"]

_CHUNK = 256
_FEW_IMAGES, _FEW_IN_CLASS, _IMBALANCE, _MANY_DUPLICATES = 1000, 50, 10, 0.01


@dataclass
class Examination:
    """What :func:`examine` found. Pixels count from 0 to 1."""

    samples: int
    resolution: int
    channels: int
    encoding: str
    classes: dict[str, int]
    """Images of each class."""
    shards: int
    bytes: int
    """Of all shards."""
    image_bytes: tuple[int, int, int]
    """Smallest, median and largest image as it is stored."""
    examined: int
    """Images that the numbers below are of."""
    mean: list[float]
    """Per channel."""
    std: list[float]
    """Per channel, over pixels of all images."""
    grey: int
    """Colour images whose channels are equal."""
    flat: int
    """Images of one colour."""
    duplicates: list[list[int]]
    """Ids of images that are byte for byte the same, over the whole data set."""
    warnings: list[str] = field(default_factory=list)

    @property
    def superfluous(self) -> int:
        """Images that are copies of others."""
        return sum(len(group) - 1 for group in self.duplicates)


def examine(
    directory: Path, images: int | None = 10_000, progress: Callable[[int, int | None], None] | None = None
) -> Examination:
    """Examine a data set in a local directory.

    Args:
        directory: of the data set.
        images: decode at most this many, the same ones every time; None decodes all.
        progress: called with (images done, images in all).

    Raises:
        DataError: the data set is damaged.
    """
    with ShardedDataset.open(directory) as dataset:
        manifest = dataset.manifest
        index = read_index(Path(directory), manifest)
        ids = _choose(len(dataset), images)
        pixels = _Pixels(manifest.channels)
        chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
        with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
            for done, chunk in enumerate(pool.map(dataset.read, chunks), start=1):
                pixels.add(chunk)
                if progress:
                    progress(min(done * _CHUNK, len(ids)), len(ids))
        lengths = index["length"]
        found = Examination(
            samples=manifest.samples,
            resolution=manifest.resolution,
            channels=manifest.channels,
            encoding=manifest.encoding,
            classes=dict(zip(manifest.classes, manifest.class_counts, strict=True)),
            shards=len(manifest.shards),
            bytes=sum(shard.bytes for shard in manifest.shards),
            image_bytes=(int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
            examined=len(ids),
            mean=pixels.mean.tolist(),
            std=pixels.std.tolist(),
            grey=pixels.grey,
            flat=pixels.flat,
            duplicates=_duplicates(Path(directory), manifest, index),
        )
    found.warnings = list(_warnings(found))
    return found


def sample_images(directory: Path, rows: int, columns: int) -> NDArray[np.uint8]:
    """Images for a picture: a row for each class, an even choice where there are more classes than rows.

    Returns:
        [rows * columns, C, H, W], by rows. Classes with fewer images than columns begin again.
    """
    with ShardedDataset.open(directory) as dataset:
        classes = len(dataset.manifest.classes)
        shown = np.arange(rows) % classes if classes <= rows else np.arange(rows) * classes // rows
        ids, labels = [], dataset.labels
        for row, label in enumerate(shown.tolist()):
            own = np.flatnonzero(labels == label)
            own = own[permutation(len(own), 0, "info", label)]
            ids.append(np.resize(np.roll(own, -columns * (row // classes)), columns))
        return dataset.read(np.concatenate(ids))


def _choose(samples: int, images: int | None) -> NDArray[np.int64]:
    if images is None or images >= samples:
        return np.arange(samples, dtype=np.int64)
    return np.sort(permutation(samples, 0, "info")[:images])


class _Pixels:
    """Sums over pixels; exact, as they are integers below 2^63."""

    def __init__(self, channels: int):
        self._count = 0
        self._sum = np.zeros(channels, dtype=np.int64)
        self._squares = np.zeros(channels, dtype=np.int64)
        self.grey = self.flat = 0

    def add(self, images: NDArray[np.uint8]) -> None:
        """Take in images [N, C, H, W]."""
        self._count += images.size // images.shape[1]
        # Pixels of 8 bits have few values: counts of them are faster than sums of squares.
        for channel in range(images.shape[1]):
            counts = np.bincount(images[:, channel].ravel(), minlength=256)
            values = np.arange(256, dtype=np.int64)
            self._sum[channel] += counts @ values
            self._squares[channel] += counts @ values**2
        if images.shape[1] == 3:
            self.grey += int((images == images[:, :1]).all(axis=(1, 2, 3)).sum())
        self.flat += int((images == images[:, :, :1, :1]).all(axis=(1, 2, 3)).sum())

    @property
    def mean(self) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = self._sum / (255.0 * self._count)
        return mean

    @property
    def std(self) -> NDArray[np.float64]:
        variance: NDArray[np.float64] = self._squares / (255.0**2 * self._count) - self.mean**2
        return np.sqrt(np.maximum(variance, 0))


def _duplicates(directory: Path, manifest: Manifest, index: Index) -> list[list[int]]:
    """Groups of ids with the same bytes: candidates by length and crc32, compared in full."""
    keys = index["length"].astype(np.uint64) << np.uint64(32) | index["crc32"]
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    candidates = np.unique(np.concatenate([order[same], order[same + 1]]))
    shard_of = np.repeat(np.arange(len(manifest.shards)), [shard.samples for shard in manifest.shards])
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number, shard in enumerate(manifest.shards):
        own = candidates[shard_of[candidates] == number]
        if len(own):
            with (directory / shard.name).open("rb") as file:
                for one in own.tolist():
                    file.seek(int(index["offset"][one]))
                    groups[hashlib.sha256(file.read(int(index["length"][one]))).digest()].append(one)
    return sorted(group for group in groups.values() if len(group) > 1)


def _warnings(found: Examination) -> Iterator[str]:
    counts = found.classes
    if len(counts) == 1:
        yield (
            "there is one class: a class-conditional system learns nothing from labels. If the images have classes, "
            "give them by folders or --labels"
        )
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] > _IMBALANCE * counts[fewest]:
        yield (
            f"classes are out of balance: {counts[most]} images of {most!r}, {counts[fewest]} of {fewest!r}; rare "
            f"classes are learnt badly. Pack with --limit, or leave rare classes out"
        )
    if len(counts) > 1 and counts[fewest] < _FEW_IN_CLASS:
        few = sum(count < _FEW_IN_CLASS for count in counts.values())
        yield f"{few} of {len(counts)} classes have fewer than {_FEW_IN_CLASS} images: they are memorised, not learnt"
    if found.samples < _FEW_IMAGES:
        yield (
            f"there are {found.samples} images: below {_FEW_IMAGES}, networks memorise them, and metrics such as FID "
            f"are biased"
        )
    if found.channels == 3 and found.grey == found.examined:
        yield "all images examined are grey but stored in colour: pack with --mode L and train with one channel"
    elif found.channels == 3 and found.grey > found.examined // 2:
        yield f"{found.grey} of {found.examined} images examined are grey among colour images"
    if found.flat:
        yield f"{found.flat} of {found.examined} images examined are of one colour, as placeholders are; remove them"
    if found.superfluous > _MANY_DUPLICATES * found.samples:
        first = ", ".join(f"{one:08d}" for one in found.duplicates[0][:3])
        yield (
            f"{found.superfluous} images are exact copies of others (such as {first}): they are learnt more often than "
            f"others, and split over training and test sets they spoil metrics"
        )
    if max(found.std) < 0.02:
        yield f"images have next to no contrast (standard deviation {max(found.std):.4f}); were 16 bits cut to 8?"
    if found.resolution & (found.resolution - 1):
        yield (
            f"{found.resolution} pixels are no power of two, as most systems need; pack with --size "
            f"{1 << found.resolution.bit_length() - 1} or {1 << found.resolution.bit_length()}"
        )
