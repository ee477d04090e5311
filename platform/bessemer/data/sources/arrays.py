"""Sources that hold pixels and not image files: NumPy's npy and npz. Object arrays, which are pickles, are refused."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bessemer.data.fields import Kind
from bessemer.errors import DataError
from bessemer.files import write_atomically

__all__ = ["LABELS", "ArrayFiles", "Labelled", "is_numpy", "numpy_arrays"]

Pixels = NDArray[np.uint8]
_AT_ONCE = 64 << 20


@dataclass
class Labelled:
    """Images [N, H, W, C], clips [N, T, H, W, C] or bits [N, bits] of one split in pieces, and their classes."""

    split: str | None
    pieces: Iterator[Pixels]
    classes: list[str] | None
    """Class of each image; None for images without classes."""


class ArrayFiles:
    """Samples of one or more arrays, as raw bytes in one file that gives random access."""

    links = 0

    def __init__(self, raw: Path, extents: dict[PurePosixPath, tuple[int, tuple[int, ...]]], stamp: str):
        self._raw = raw.absolute()
        self._extents = extents
        self._stamp = stamp

    @property
    def paths(self) -> list[PurePosixPath]:
        return list(self._extents)

    def read(self, path: PurePosixPath) -> Pixels:
        offset, shape = self._extents[path]
        try:
            pixels = np.fromfile(self._raw, dtype=np.uint8, count=int(np.prod(shape)), offset=offset)
        except OSError as error:
            raise ValueError(f"{self._raw} cannot be read: {error.strerror}") from None
        return pixels.reshape(shape)

    def shape(self, path: PurePosixPath) -> tuple[int, ...]:
        """Of one sample."""
        return self._extents[path][1]

    def part(self, paths: Iterable[PurePosixPath]) -> ArrayFiles:
        return ArrayFiles(self._raw, {path: self._extents[path] for path in paths}, self._stamp)

    def stamp(self) -> str:
        return self._stamp

    def close(self) -> None:
        pass

    @classmethod
    def spool(
        cls, arrays: Iterable[Labelled], raw: Path, stamp: str
    ) -> tuple[ArrayFiles, dict[PurePosixPath, str] | None]:
        """Lay the arrays end to end into the file `raw`.

        Returns:
            The files, named ``<split>/<number>.png``, and their classes.
        """
        extents: dict[PurePosixPath, tuple[int, tuple[int, ...]]] = {}
        labels: dict[PurePosixPath, str] = {}

        def write(file: IO[bytes]) -> None:
            offset = 0
            for array in arrays:
                number = 0
                folder = PurePosixPath(array.split or "")
                for piece in array.pieces:
                    shape = piece.shape[1:]
                    file.write(np.ascontiguousarray(piece).data)
                    for _ in range(len(piece)):
                        path = folder / f"{number:08d}.png"
                        extents[path] = (offset, shape)
                        if array.classes is not None:
                            labels[path] = array.classes[number]
                        offset += int(np.prod(shape))
                        number += 1

        write_atomically(raw, write)
        return cls(raw, extents, stamp), labels or None


# NumPy

_IMAGES = ("images", "image", "data", "x", "imgs", "samples", "arr_0")
LABELS = ("labels", "label", "targets", "target", "y", "classes", "arr_1")
"""Names of arrays of labels."""


def is_numpy(path: PurePosixPath) -> bool:
    """Whether a file is NumPy's, by its name."""
    return path.suffix.lower() in (".npy", ".npz")


def numpy_arrays(name: str, file: IO[bytes], labels: IO[bytes] | None = None, kind: Kind = "images") -> list[Labelled]:
    """The images, clips or bits in an npy or npz file.

    An npz holds ``images`` and ``labels`` (or ``x`` and ``y``, ``data`` and ``targets``; ``arr_0`` and ``arr_1`` as
    ``numpy.savez(file, images, labels)`` names them), or several of them with a split: ``x_train``, ``test_images``.
    Images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels (4 with transparency), clips the same
    with T after N, bits [N, ...] of any type whose values are 0 and 1; labels are integers or text [N].

    Args:
        name: of the file, for messages.
        file: open for reading, seekable.
        labels: an npy file with the labels of an npy file.
        kind: what a sample is.

    Raises:
        DataError: names the array, what it is, and what it must be.
    """
    if file.read(6) == b"\x93NUMPY":
        file.seek(0)
        found = _npy(name, file)
        classes = None if labels is None else _classes(f"labels of {name}", _npy("labels", labels).whole(), found.count)
        return [Labelled(None, found.samples(kind), classes)]
    file.seek(0)
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except Exception as error:  # zipfile raises whatever a damaged directory makes it raise
        raise DataError(f"{name}: this npz file is damaged or cut off ({error}); copy it again") from None

    def array(key: str) -> _Npy:
        try:
            return _npy(f"{name}: array {key}", archive.open(members[key]))
        # ValueError: a damaged directory that places the array before the start of the file
        except (RuntimeError, zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{name}: array {key} cannot be read ({error}); copy the file again") from None

    arrays = []
    for split, images_key, labels_key in _pairs(name, list(members)):
        images = array(images_key)
        classes = None
        if labels_key is not None:
            classes = _classes(f"{name}: array {labels_key}", array(labels_key).whole(), images.count)
        arrays.append(Labelled(split, images.samples(kind), classes))
    return arrays


def _pairs(name: str, keys: list[str]) -> list[tuple[str | None, str, str | None]]:
    """Which arrays are images, which are their labels, and of which split."""
    found: dict[str | None, dict[str, str]] = {}
    for key in keys:
        words = key.lower()
        split = None
        if match := re.fullmatch(
            r"(train|test|val|valid|validation)_(.+)|(.+)_(train|test|val|valid|validation)", words
        ):
            split, words = match[1] or match[4], match[2] or match[3]
        kind = "images" if words in _IMAGES else "labels" if words in LABELS else None
        if kind is not None and found.setdefault(split, {}).setdefault(kind, key) != key:
            raise DataError(
                f"{name}: the arrays {found[split][kind]} and {key} could both be the {kind}; name them images and "
                f"labels"
            )
    pairs = [(split, pair["images"], pair.get("labels")) for split, pair in found.items() if "images" in pair]
    if not pairs:
        raise DataError(
            f"{name} has the arrays {', '.join(sorted(keys)[:8]) or '(none)'}; none is named as images are: images, x "
            f"or data, with labels, y or targets beside it. Write it as numpy.savez(file, images=..., labels=...)"
        )
    return pairs


@dataclass
class _Npy:
    """An array in a stream."""

    name: str
    stream: IO[bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return self.shape[0]

    def whole(self) -> NDArray[Any]:
        return self._take(self.count)

    def samples(self, kind: Kind) -> Iterator[Pixels]:
        """The array as images [n, H, W, C], clips [n, T, H, W, C] or bits [n, bits], some at a time."""
        return self._bits() if kind == "bits" else self._pictures("T, " if kind == "clips" else "")

    def _pictures(self, time: str) -> Iterator[Pixels]:
        rest = self.shape[2:] if time else self.shape[1:]
        last = len(rest) == 3 and rest[2] in (1, 3, 4)
        first = len(rest) == 3 and rest[0] in (1, 3, 4)
        if self.dtype != np.uint8 or not (len(rest) == 2 or last or first) or 0 in self.shape:
            raise DataError(
                f"{self.name} is {self.dtype} {list(self.shape)}; {'clips' if time else 'images'} are uint8 "
                f"[N, {time}H, W], [N, {time}H, W, C] or [N, {time}C, H, W] with 1, 3 or 4 channels: convert it, such "
                f"as (x * 255).round().astype('uint8')"
            )
        for piece in self._pieces():
            if len(rest) == 2:
                yield piece[..., None]
            else:
                yield piece if last else np.moveaxis(piece, -3, -1)

    def _bits(self) -> Iterator[Pixels]:
        if self.dtype.kind not in "buif" or len(self.shape) < 2 or 0 in self.shape:
            raise DataError(f"{self.name} is {self.dtype} {list(self.shape)}; bits are numbers [N, ...], each 0 or 1")
        done = 0
        for piece in self._pieces():
            flat = piece.reshape(len(piece), -1)
            wrong = (flat != 0) & (flat != 1)
            if wrong.any():
                row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
                raise DataError(
                    f"{self.name} has {flat[row, column]} in sample {done + int(row)}; bits are 0 or 1: make them so, "
                    f"such as (x > 0.5).astype('uint8')"
                )
            done += len(piece)
            yield flat.astype(np.uint8)

    def _pieces(self) -> Iterator[NDArray[Any]]:
        most = max(1, _AT_ONCE // (int(np.prod(self.shape[1:])) * self.dtype.itemsize))
        done = 0
        while done < self.count:
            piece = self._take(min(most, self.count - done))
            done += len(piece)
            yield piece

    def _take(self, count: int) -> NDArray[Any]:
        size = count * int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            data = self.stream.read(size)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{self.name} is damaged ({error}); copy the file again") from None
        if len(data) != size:
            raise DataError(f"{self.name} is cut off: {size - len(data)} bytes are missing; copy the file again")
        return np.frombuffer(data, dtype=self.dtype).reshape(count, *self.shape[1:])


def _npy(name: str, stream: IO[bytes]) -> _Npy:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # it evaluates a literal, which raises many things
        raise DataError(f"{name} is no NumPy array ({error}); write it with numpy.save or numpy.savez") from None
    if dtype.hasobject:
        raise DataError(
            f"{name} holds Python objects, which could run code and are never loaded; save it as an array of one type "
            f"and shape: numpy.stack(images) of uint8"
        )
    if not shape or any(edge < 0 for edge in shape) or dtype.itemsize == 0 or (fortran and len(shape) > 1):
        raise DataError(
            f"{name} is {dtype} {list(shape)}{', in Fortran order' if fortran else ''}; save it in C order: "
            f"numpy.ascontiguousarray(images)"
        )
    return _Npy(name, stream, dtype, shape)


def _classes(name: str, labels: NDArray[Any], images: int) -> list[str]:
    """Class names from an array of labels."""
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras and MedMNIST store them
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS" or len(labels) != images:
        raise DataError(
            f"{name} is {labels.dtype} {list(labels.shape)} for {images} images; labels are one integer or text per "
            f"image"
        )
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in labels.tolist()]
