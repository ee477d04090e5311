"""The index: where every sample lies in its shard, as one plain NumPy array without pickle.

``index.npy`` holds one 20-byte record per sample, in the order of the shards; where a sample has several files, such as
the frames of a clip, one for each of them. NumPy reads it as it is; this module does so without parsing anything,
because header and size follow from the manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bessemer.errors import DataError

__all__ = ["INDEX_DTYPE", "Index", "index_bytes", "parse_index"]

INDEX_DTYPE = np.dtype([("offset", "<i8"), ("length", "<u4"), ("label", "<u4"), ("crc32", "<u4")])
"""Position of the file in the shard (bytes), its length (bytes), class index of the sample, crc32 of its bytes."""

Index = NDArray[np.void]


def _header(samples: int, members: int = 1) -> bytes:
    """Header of a version 1.0 .npy file, written out so that it is the same with every NumPy."""
    shape = f"({samples},)" if members == 1 else f"({samples}, {members})"
    text = f"{{'descr': {INDEX_DTYPE.descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    padding = -(10 + len(text) + 1) % 64
    body = text.encode("latin1") + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def index_bytes(index: Index) -> bytes:
    """The file of an index, [samples] or [samples, members]."""
    return _header(*index.shape) + index.astype(INDEX_DTYPE, copy=False).tobytes()


def parse_index(
    data: bytes,
    source: Path | str,
    *,
    shard_bytes: list[int],
    shard_samples: list[int],
    class_counts: list[int],
    members: int = 1,
) -> Index:
    """Check an index against the shards it belongs to.

    Args:
        data: content of the file.
        source: its name, for messages.
        shard_bytes: size of each shard.
        shard_samples: samples of each shard.
        class_counts: samples of each class.
        members: files of each sample.

    Returns:
        [samples, members].

    Raises:
        DataError: anything is not as the manifest says; names the record.
    """
    samples = sum(shard_samples)
    header = _header(samples, members)
    fix = "copy it again from where it was packed, or pack the data set anew"
    each = "" if members == 1 else f" of {members} files"
    expected = len(header) + samples * members * INDEX_DTYPE.itemsize
    if len(data) != expected:
        raise DataError(f"{source}: the index has {len(data)} bytes, {samples} samples{each} need {expected}; {fix}")
    if not data.startswith(header):
        raise DataError(f"{source}: this is not the index of {samples} samples (its header differs); {fix}")
    index: Any = np.frombuffer(data, dtype=INDEX_DTYPE, offset=len(header)).reshape(samples, members)

    offset = index["offset"]
    end_of_shard = np.repeat(np.asarray(shard_bytes, dtype=np.int64), shard_samples)[:, None]
    # Compared this way round so that no hostile offset overflows.
    outside = (offset < 512) | (offset % 512 != 0) | (offset > end_of_shard - index["length"].astype(np.int64))
    if outside.any():
        first, member = divmod(int(np.argmax(outside)), members)
        raise DataError(
            f"{source}: sample {first} lies at byte {int(offset[first, member])} "
            f"(+{int(index['length'][first, member])}) of a shard of {int(end_of_shard[first, 0])} bytes; every sample "
            f"lies inside its shard, at a multiple of 512; {fix}"
        )
    classes = len(class_counts)
    labels = index["label"][:, 0]
    foreign = labels >= classes
    if foreign.any():
        first = int(np.argmax(foreign))
        raise DataError(f"{source}: sample {first} has label {int(labels[first])} of {classes} classes; {fix}")
    if (torn := (index["label"] != labels[:, None]).any(axis=1)).any():
        raise DataError(f"{source}: the files of sample {int(np.argmax(torn))} have different labels; {fix}")
    counts = np.bincount(labels, minlength=classes).tolist()
    if counts != list(class_counts):
        raise DataError(f"{source}: class counts are {counts}, the manifest says {list(class_counts)}; {fix}")
    return index  # type: ignore[no-any-return]
