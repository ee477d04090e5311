"""Writing WebDataset shards: plain ustar tars whose bytes depend on the samples alone."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bessemer.data.index import INDEX_DTYPE, Index
from bessemer.data.manifest import ShardRecord
from bessemer.data.sources.tars import BLOCK
from bessemer.files import hidden_name, sync

__all__ = ["ShardWriter", "stored_bytes"]

_END = bytes(2 * BLOCK)
_FLUSH = 1 << 20


class ShardWriter:
    """Writes one shard and keeps its part of the index.

    A sample is its files, such as ``<number>.jpg``, and ``<number>.cls`` (the label in decimal digits), as the
    `webdataset` library reads them.

    Args:
        path: of the shard. It appears when it is complete and on the disk.
        first: number of its first sample.
    """

    def __init__(self, path: Path, first: int):
        self._path = path
        self._number = first
        self._aside = hidden_name(path)
        self._descriptor = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._written = 0
        self._records: list[list[tuple[int, int, int, int]]] = []

    def add(self, files: Iterable[tuple[str, bytes]], label: int) -> None:
        """Append one sample: what follows the number in the names of its files, and their content."""
        name = b"%08d." % self._number
        records = []
        for ending, data in files:
            self._member(name + ending.encode("ascii"), data)
            offset = self._written + len(self._buffer) - _padded(len(data))
            records.append((offset, len(data), label, zlib.crc32(data)))
        self._member(name + b"cls", b"%d" % label)
        self._records.append(records)
        self._number += 1
        if len(self._buffer) >= _FLUSH:
            self._flush()

    def finish(self) -> tuple[ShardRecord, Index]:
        """Complete the shard."""
        self._buffer += _END
        self._flush()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._aside.replace(self._path)
        sync(self._path.parent)
        record = ShardRecord(
            name=self._path.name, bytes=self._written, sha256=self._digest.hexdigest(), samples=len(self._records)
        )
        index = np.array(self._records, dtype=INDEX_DTYPE)
        return record, index[:, 0] if index.shape[1] == 1 else index

    def abandon(self) -> None:
        """Drop the shard."""
        os.close(self._descriptor)
        self._aside.unlink(missing_ok=True)

    def _member(self, name: bytes, data: bytes) -> None:
        self._buffer += _header(name, len(data))
        self._buffer += data
        self._buffer += bytes(-len(data) % BLOCK)

    def _flush(self) -> None:
        self._digest.update(self._buffer)
        rest = memoryview(self._buffer)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        rest.release()
        self._written += len(self._buffer)
        self._buffer = bytearray()


def stored_bytes(sizes: Iterable[int]) -> int:
    """Bytes that a sample with files of these sizes takes in a shard: they and the label, each with its header."""
    return 2 * BLOCK + sum(BLOCK + _padded(size) for size in sizes)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# A ustar header (POSIX.1-1988) of a regular file: mode 444, owner 0, time 0. Only name, length and checksum change.
_MODE_AND_OWNER = b"0000444\0" + b"0000000\0" + b"0000000\0"
_TIME = b"\0" + b"%011o\0" % 0
_TAIL = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
# The checksum counts as eight spaces while it is summed.
_SUM = sum(_MODE_AND_OWNER) + sum(_TIME) + 8 * 0x20 + sum(_TAIL)


def _header(name: bytes, size: int) -> bytes:
    length = b"%011o" % size
    checksum = b"%06o\0 " % (_SUM + sum(name) + sum(length))
    return b"".join((name.ljust(100, b"\0"), _MODE_AND_OWNER, length, _TIME, checksum, _TAIL))
