"""Sets of images to compare: a packed data set, or images as others made them, in a folder or an archive."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.decode import decode
from bessemer.data.sources.source import Source, open_source
from bessemer.errors import DataError, EvaluationError

__all__ = ["FieldImages", "ImageFiles", "RealImages", "field_images", "open_images", "read_in_groups"]


class RealImages(Protocol):
    """What evaluation asks of images; :class:`bessemer.data.reading.dataset.ShardedDataset` has it."""

    @property
    def manifest(self) -> Any:
        """Its `hash` names the images, its `classes` the classes."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[n] class of each image."""

    def __len__(self) -> int: ...

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [N, C, H, W] of these numbers."""


@dataclass(frozen=True)
class _Manifest:
    hash: str
    classes: tuple[str, ...]


class ImageFiles:
    """Images in files of any size and format. Those without colour keep one channel; transparency is laid over white.

    Two sets have the same hash when their files have the same names and contents.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        index = {name: number for number, name in enumerate(source.classes)}
        self.labels = np.array([index[entry.class_name] for entry in source.entries], dtype=np.int64)
        self._digests: dict[int, bytes] = {}  # of the contents, noted when they are read

    @cached_property
    def manifest(self) -> _Manifest:
        """Hash and classes; reads what has not been read yet.

        Raises:
            DataError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for number, entry in enumerate(self._source.entries):
            if number not in self._digests:
                self._content(number)
            digest.update(f"{entry.class_name}/{entry.key}\n".encode() + self._digests[number])
        return _Manifest(digest.hexdigest(), tuple(self._source.classes))

    def __len__(self) -> int:
        return len(self._source.entries)

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [N, C, H, W] of these numbers.

        Raises:
            DataError: an image is damaged, or they differ in size.
        """
        groups = self.read_groups(ids)
        if len(groups) != 1:
            sizes = ", ".join(str(list(images.shape[1:])) for _, images in groups[:5])
            raise DataError(f"{self._source.name}: its images differ in size ({sizes}); take one size at a time.")
        return groups[0][1]

    def read_fields(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]]:
        """The same by the name of the only field."""
        return {"images": self.read(ids)}

    def read_groups(self, ids: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Positions in `ids`, and the images there as [N, C, H, W]: one pair for each shape.

        Raises:
            DataError: an image is damaged; names the file.
        """
        found: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = defaultdict(list)
        for position, number in enumerate(ids.tolist()):
            image = self._pixels(number)
            found[image.shape].append((position, image))
        return [
            (np.array([p for p, _ in pairs], dtype=np.int64), np.stack([image for _, image in pairs]))
            for pairs in found.values()
        ]

    def name(self, number: int) -> str:
        """Path of an image below the folder."""
        return str(self._source.entries[number].path)

    def _content(self, number: int) -> bytes | NDArray[np.uint8]:
        """An image file, or the pixels of a source that holds arrays."""
        entry = self._source.entries[number]
        try:
            content = self._source.files.read(entry.path)
        except ValueError as e:
            raise self._damaged(str(entry.path), e) from None
        if number not in self._digests:
            plain = content if isinstance(content, bytes) else f"{content.shape}".encode() + content.tobytes()
            self._digests[number] = hashlib.sha256(plain).digest()
        return content

    def _pixels(self, number: int) -> NDArray[np.uint8]:
        content = self._content(number)
        if isinstance(content, bytes):
            content = self._decoded(number, content)
        return np.ascontiguousarray(content[None] if content.ndim == 2 else content.transpose(2, 0, 1))

    def _decoded(self, number: int, data: bytes) -> NDArray[np.uint8]:
        """[H, W] or [H, W, 3]."""
        try:
            image = decode(data)
        except ValueError as e:
            raise self._damaged(self.name(number), e) from None
        if image.mode not in ("L", "RGB"):
            if image.mode.startswith(("I", "F")):
                raise self._damaged(self.name(number), ValueError(f"{image.mode} pixels have more than 8 bits"))
            coloured = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", coloured.size, (255, 255, 255, 255)), coloured)
            image = image.convert("RGB")
        return np.asarray(image, dtype=np.uint8)

    def _damaged(self, name: str, error: Exception) -> DataError:
        return DataError(f"{self._source.name}: {name} cannot be read: {error}; replace or remove it.")


class FieldImages:
    """One field of a packed data set as a set of images: the targets of pairs, or one of two domains."""

    def __init__(self, dataset: ShardedDataset, field: str) -> None:
        manifest, self._dataset = dataset.manifest, dataset
        # Samples of two domains hold an image each, those of the first domain first.
        self._field = manifest.sample_fields[0].name if manifest.kind == "domains" else field
        self._ids, self.labels, classes = np.arange(len(dataset)), dataset.labels, tuple(manifest.classes)
        if manifest.kind == "domains":
            names: list[str] = [one.name for one in manifest.batch_fields]
            domain = names.index(field)
            self._ids = np.flatnonzero(self.labels == domain)
            self.labels, classes = np.zeros(len(self._ids), dtype=np.int64), classes[domain : domain + 1]
        self.manifest = _Manifest(hashlib.sha256(f"{manifest.hash} {field}".encode()).hexdigest(), classes)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [N, C, H, W] of these numbers.

        Raises:
            DataError: a sample is damaged; names shard, key and offset.
        """
        return self._dataset.read_fields(self._ids[ids])[self._field]


def field_images(images: RealImages, field: str) -> RealImages:
    """A field of a packed data set of several, as :class:`FieldImages`; any other set as it is.

    Raises:
        EvaluationError: the data set has fields, but not this one.
    """
    if not isinstance(images, ShardedDataset) or len(images.manifest.batch_fields) == 1:
        return images
    names = [one.name for one in images.manifest.batch_fields]
    if field not in names:
        raise EvaluationError(
            f"{images.place} has the fields {', '.join(names)} and no {field}; name another data set."
        )
    return FieldImages(images, field)


@contextmanager
def open_images(place: str | Path) -> Iterator[RealImages]:
    """A packed data set, by its directory or address; or else the images of a folder or an archive.

    Raises:
        DataError: there is nothing at `place`, or it holds no images.
    """
    if "://" in str(place) or (Path(place) / "manifest.json").is_file():
        with ShardedDataset.open(place) as dataset:
            yield dataset
        return
    with (
        tempfile.TemporaryDirectory(prefix="bessemer-images-") as spool,
        open_source(place, spool_folder=Path(spool)) as source,
    ):
        yield ImageFiles(source)


def read_in_groups(images: RealImages, ids: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Positions in `ids`, and the images there as [N, C, H, W]: one pair for each shape."""
    if isinstance(images, ImageFiles):
        return images.read_groups(ids)
    return [(np.arange(len(ids)), images.read(ids))]
