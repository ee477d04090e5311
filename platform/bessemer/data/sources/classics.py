"""The files of CIFAR and MNIST. The Python version of CIFAR, which is pickles, is refused."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from bessemer.data.sources.archives import Files
from bessemer.data.sources.arrays import Labelled
from bessemer.errors import DataError

__all__ = ["cifar", "idx", "is_cifar", "is_idx", "refuse_pickles"]

Pixels = NDArray[np.uint8]

# CIFAR

_CIFAR_NAMES = ("batches.meta.txt", "fine_label_names.txt")
_PIXELS = 3 * 32 * 32


def is_cifar(path: PurePosixPath) -> bool:
    """Whether a file is a batch of CIFAR's binary version, by its name."""
    return re.fullmatch(r"(data_batch_\d+|test_batch|train|test)\.bin", path.name) is not None


def cifar(files: Files) -> Iterator[Labelled]:
    """CIFAR-10 and CIFAR-100, binary version: records of one (CIFAR-10) or two label bytes and 32x32 planes R, G, B.

    CIFAR-100 has a coarse label and a fine one; the fine one is taken. See "CIFAR-10 and CIFAR-100 datasets",
    https://www.cs.toronto.edu/~kriz/cifar.html.

    Raises:
        DataError: a file is cut off, or a label has no name.
    """
    names: list[str] | None = None
    for path in files.paths:
        if path.name in _CIFAR_NAMES:
            names = _read(files, path).decode("utf-8", "replace").split()
    for path in sorted(filter(is_cifar, files.paths)):
        data = np.frombuffer(_read(files, path), dtype=np.uint8)
        before = 1 if "batch" in path.name else 2
        record = before + _PIXELS
        if not len(data) or len(data) % record:
            raise DataError(
                f"{path}: {len(data)} bytes are no whole number of records of {record}; it is cut off or no file of "
                f"CIFAR: copy it again"
            )
        rows = data.reshape(-1, record)
        labels = rows[:, before - 1].tolist()
        if names is not None and max(labels) >= len(names):
            raise DataError(f"{path}: label {max(labels)}, but there are names of {len(names)} classes; copy it again")
        classes = [str(label) if names is None else names[label] for label in labels]
        images = rows[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        split = "test" if path.name.startswith("test") else "train"
        # The batches of a split follow each other; their images must not have the same names.
        yield Labelled(split if path.stem == split else f"{split}/{path.stem}", iter([images]), classes)


def refuse_pickles(name: str, paths: Iterable[PurePosixPath]) -> None:
    """Refuse the Python version of CIFAR, which is pickles.

    Raises:
        DataError: this is it.
    """
    names = {path.name for path in paths}
    if {"data_batch_1", "batches.meta"} <= names or {"train", "test", "meta"} <= names:
        raise DataError(
            f"{name} is the Python version of CIFAR: pickles, which can run code when they are loaded, so they never "
            f"are. Take the binary version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz from the same page), or "
            f"write arrays: numpy.savez('cifar.npz', images=dataset.data, labels=dataset.targets)"
        )


# MNIST

_IDX = re.compile(r"(.*?)-?(images|labels)[.-]idx([31])-ubyte(\.gz)?")


def is_idx(path: PurePosixPath) -> bool:
    """Whether a file holds images as MNIST does, by its name."""
    match = _IDX.fullmatch(path.name)
    return match is not None and match[2] == "images"


def idx(files: Files) -> Iterator[Labelled]:
    """MNIST and its like: ``train-images-idx3-ubyte`` with ``train-labels-idx1-ubyte``, also ``t10k-``, also ``.gz``.

    An idx file is two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension as 32 bits,
    the highest byte first, and the numbers; see "The MNIST database", http://yann.lecun.com/exdb/mnist/.

    Raises:
        DataError: a file is damaged, or has as many labels as there are no images.
    """
    labels = {}
    for path in files.paths:
        match = _IDX.fullmatch(path.name)
        if match and match[2] == "labels":
            labels[path.parent, match[1]] = path
    for path in sorted(filter(is_idx, files.paths)):
        match = _IDX.fullmatch(path.name)
        assert match is not None
        images = _idx(path, _read(files, path), 3)
        classes = None
        if (path.parent, match[1]) in labels:
            label_path = labels[path.parent, match[1]]
            found = _idx(label_path, _read(files, label_path), 1)
            if len(found) != len(images):
                raise DataError(f"{label_path} has {len(found)} labels for the {len(images)} images of {path}")
            classes = [str(label) for label in found.tolist()]
        split = {"": None, "t10k": "test"}.get(match[1], match[1])
        yield Labelled(split, iter([images[..., None]]), classes)


def _idx(path: PurePosixPath, data: bytes, dimensions: int) -> Pixels:
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: this gzip file is damaged or cut off ({error}); copy it again") from None
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise DataError(
            f"{path} starts with {data[:4]!r}; an idx file of bytes with {dimensions} dimensions starts with "
            f"{bytes([0, 0, 8, dimensions])!r}"
        )
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    size = 1
    for edge in shape:
        size *= edge
    if size == 0 or len(data) != start + size:
        raise DataError(f"{path} has {len(data) - start} bytes of numbers, {shape} needs {size}; copy it again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _read(files: Files, path: PurePosixPath) -> bytes:
    try:
        data = files.read(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    assert isinstance(data, bytes)
    return data
