"""What a data set is like: balance, sizes, pixel statistics, duplicates, and what of it ruins runs."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bessemer.data.fields import NOUNS, FieldRecord
from bessemer.data.index import Index
from bessemer.data.manifest import Manifest
from bessemer.data.order import permutation
from bessemer.data.pictures import pictures
from bessemer.data.reading.dataset import ShardedDataset, read_index

__all__ = ["Examination", "ExaminedField", "examine", "sample_images"]

_CHUNK = 256
_FEW_IMAGES, _FEW_IN_CLASS, _IMBALANCE, _MANY_DUPLICATES = 1000, 50, 10, 0.01


@dataclass
class ExaminedField:
    """A field of the samples that were looked at. Pixels and bits count from 0 to 1, sound from -1 to 1."""

    name: str
    shape: list[int]
    encoding: str
    rate: int | None
    mean: list[float]
    """Per channel."""
    std: list[float]
    """Per channel, over all pixels, samples of sound, or bits."""
    grey: int
    """Colour pictures whose channels are equal."""
    flat: int
    """Pictures of one colour; silent pieces of sound; vectors of equal bits."""


@dataclass
class Examination:
    """What :func:`examine` found."""

    samples: int
    kind: str
    """What a sample is."""
    fields: list[ExaminedField]
    """What a sample holds."""
    classes: dict[str, int]
    """Images of each class."""
    shards: int
    bytes: int
    """Of all shards."""
    image_bytes: tuple[int, int, int]
    """Smallest, median and largest sample as it is stored."""
    examined: int
    """Samples whose content was looked at."""
    duplicates: list[list[int]]
    """Ids of samples that are byte for byte the same, over the whole data set."""
    warnings: list[str] = field(default_factory=list)

    @property
    def superfluous(self) -> int:
        """Samples that are copies of others."""
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
        sums = [_Sums(one) for one in dataset.fields]
        chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
        with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
            for done, chunk in enumerate(pool.map(dataset.read_fields, chunks), start=1):
                for own in sums:
                    own.add(chunk[own.record.name])
                if progress:
                    progress(min(done * _CHUNK, len(ids)), len(ids))
        lengths = index["length"].sum(axis=1, dtype=np.int64)
        found = Examination(
            samples=manifest.samples,
            kind=manifest.kind,
            fields=[own.found() for own in sums],
            classes=dict(zip(manifest.classes, manifest.class_counts, strict=True)),
            shards=len(manifest.shards),
            bytes=sum(shard.bytes for shard in manifest.shards),
            image_bytes=(int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
            examined=len(ids),
            duplicates=_duplicates(Path(directory), manifest, index),
        )
    found.warnings = list(_warnings(found))
    return found


def sample_images(directory: Path, rows: int, columns: int) -> NDArray[np.uint8]:
    """Pictures of samples: a row for each class, an even choice where there are more classes than rows.

    Returns:
        [rows * columns, C, H, W], by rows; see :func:`bessemer.data.pictures.pictures`. Classes with fewer samples than
        columns begin again.
    """
    with ShardedDataset.open(directory) as dataset:
        classes = len(dataset.manifest.classes)
        shown = np.arange(rows) % classes if classes <= rows else np.arange(rows) * classes // rows
        ids, labels = [], dataset.labels
        for row, label in enumerate(shown.tolist()):
            own = np.flatnonzero(labels == label)
            own = own[permutation(len(own), 0, "info", label)]
            ids.append(np.resize(np.roll(own, -columns * (row // classes)), columns))
        return pictures(dataset.read_fields(np.concatenate(ids)))


def _choose(samples: int, images: int | None) -> NDArray[np.int64]:
    if images is None or images >= samples:
        return np.arange(samples, dtype=np.int64)
    return np.sort(permutation(samples, 0, "info")[:images])


class _Sums:
    """Sums over the values of a field; exact, as they are integers below 2^63."""

    def __init__(self, record: FieldRecord):
        self.record = record
        self._channels = record.shape[-3] if record.is_picture else 1
        self._count = 0
        self._sum = np.zeros(self._channels, dtype=np.int64)
        self._squares = np.zeros(self._channels, dtype=np.int64)
        self._grey = self._flat = 0

    def add(self, values: NDArray[Any]) -> None:
        """Take in samples [N, *shape]."""
        if self.record.name == "clips":
            values = values.reshape(-1, *values.shape[2:])
        elif not self.record.is_picture:
            values = values[:, None, None, :]
        self._count += values.size // self._channels
        for channel in range(self._channels):
            # Few values are possible: counts of them are faster than sums of squares.
            low = int(np.iinfo(values.dtype).min)
            counts = np.bincount(values[:, channel].ravel().astype(np.int64) - low)
            levels = np.arange(low, low + len(counts), dtype=np.int64)
            self._sum[channel] += counts @ levels
            self._squares[channel] += counts @ levels**2
        if self._channels == 3:
            self._grey += int((values == values[:, :1]).all(axis=(1, 2, 3)).sum())
        self._flat += int((values == values[:, :, :1, :1]).all(axis=(1, 2, 3)).sum())

    def found(self) -> ExaminedField:
        """What the samples were like."""
        scale = {"audio": 32768.0, "bits": 1.0}.get(self.record.name, 255.0)
        mean = self._sum / (scale * self._count)
        std = np.sqrt(np.maximum(self._squares / (scale**2 * self._count) - mean**2, 0))
        record = self.record
        return ExaminedField(
            record.name,
            record.shape,
            record.encoding,
            record.rate,
            mean.tolist(),
            std.tolist(),
            self._grey,
            self._flat,
        )


def _duplicates(directory: Path, manifest: Manifest, index: Index) -> list[list[int]]:
    """Groups of ids with the same bytes: candidates by lengths and crc32s, compared in full."""
    keys = np.zeros(len(index), dtype=np.uint64)
    for member in range(index.shape[1]):  # of several files, a polynomial of theirs
        own = index["length"][:, member].astype(np.uint64) << np.uint64(32) | index["crc32"][:, member]
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + own
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
                    digest = hashlib.sha256()
                    for offset, length, _, _ in index[one].tolist():
                        file.seek(offset)
                        digest.update(hashlib.sha256(file.read(length)).digest())
                    groups[digest.digest()].append(one)
    return sorted(group for group in groups.values() if len(group) > 1)


def _warnings(found: Examination) -> Iterator[str]:
    counts = found.classes
    thing = NOUNS[found.kind]
    if len(counts) == 1 and found.kind in ("images", "clips"):
        yield (
            "there is one class: a class-conditional system learns nothing from labels. If the images have classes, "
            "give them by folders or --labels"
        )
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] > _IMBALANCE * counts[fewest] and found.kind != "domains":
        yield (
            f"classes are out of balance: {counts[most]} {thing} of {most!r}, {counts[fewest]} of {fewest!r}; rare "
            f"classes are learnt badly. Pack with --limit, or leave rare classes out"
        )
    if len(counts) > 1 and counts[fewest] < _FEW_IN_CLASS and found.kind != "domains":
        few = sum(count < _FEW_IN_CLASS for count in counts.values())
        yield f"{few} of {len(counts)} classes have fewer than {_FEW_IN_CLASS} images: they are memorised, not learnt"
    if found.samples < _FEW_IMAGES:
        yield (
            f"there are {found.samples} {thing}: below {_FEW_IMAGES}, networks memorise them, and metrics such as FID "
            f"are biased"
        )
    if found.superfluous > _MANY_DUPLICATES * found.samples:
        first = ", ".join(f"{one:08d}" for one in found.duplicates[0][:3])
        yield (
            f"{found.superfluous} {thing} are exact copies of others (such as {first}): they are learnt more often "
            f"than others, and split over training and test sets they spoil metrics"
        )
    for one in found.fields:
        yield from _picture_warnings(one, found) if one.name not in ("audio", "bits") else _other_warnings(one, found)


def _picture_warnings(one: ExaminedField, found: Examination) -> Iterator[str]:
    looked = found.examined * (one.shape[0] if one.name == "clips" else 1)
    what = {"images": "images", "clips": "frames"}.get(one.name, one.name)
    if one.shape[-3] == 3 and one.grey == looked:
        yield f"all {what} examined are grey but stored in colour: pack with --mode L and train with one channel"
    elif one.shape[-3] == 3 and one.grey > looked // 2:
        yield f"{one.grey} of {looked} {what} examined are grey among colour images"
    if one.flat and one.name == "images":
        yield f"{one.flat} of {looked} {what} examined are of one colour, as placeholders are; remove them"
    if max(one.std) < 0.02:
        yield f"{what} have next to no contrast (standard deviation {max(one.std):.4f}); were 16 bits cut to 8?"
    edge = one.shape[-1]
    if edge & (edge - 1) and one is found.fields[0]:
        yield (
            f"{edge} pixels are no power of two, as most systems need; pack with --size {1 << edge.bit_length() - 1} "
            f"or {1 << edge.bit_length()}"
        )


def _other_warnings(one: ExaminedField, found: Examination) -> Iterator[str]:
    if one.flat:
        what = "pieces of sound are silent" if one.name == "audio" else "vectors have all bits equal"
        yield f"{one.flat} of {found.examined} {what}; remove them"
    if one.name == "audio" and one.std[0] < 0.01:
        yield f"the sound is very quiet (root mean square {one.std[0]:.4f} of 1); were the recordings scaled down?"
    if one.name == "audio" and abs(one.mean[0]) > 0.05:
        yield f"the sound has an offset (mean {one.mean[0]:.3f}), as recordings through direct current have; remove it"
