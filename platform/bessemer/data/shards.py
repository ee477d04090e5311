"""Writing WebDataset shards: plain ustar tars whose bytes depend on the samples alone."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from bessemer.data.index import INDEX_DTYPE, Index
from bessemer.data.manifest import ShardRecord

__all__ = ["ShardWriter"]

_BLOCK = 512
_END = bytes(2 * _BLOCK)


class ShardWriter:
    """Appends samples to ``shard-000000.tar``, ``shard-000001.tar``, ... and keeps the index.

    A sample is two members, ``<number>.jpg`` or ``.png`` and ``<number>.cls`` (the label in decimal digits), as the
    `webdataset` library reads them.

    Args:
        directory: where the shards go.
        shard_bytes: a shard is closed before it would grow beyond this; it holds at least one sample.
    """

    def __init__(self, directory: Path, shard_bytes: int):
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._descriptor: int | None = None
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._written = 0
        self._in_shard = 0
        self._records: list[tuple[int, int, int, int]] = []
        self.shards: list[ShardRecord] = []

    @property
    def samples(self) -> int:
        """Samples added so far."""
        return len(self._records)

    def add(self, data: bytes, ending: str, label: int) -> None:
        """Append one sample."""
        digits = str(label).encode()
        size = 2 * _BLOCK + _padded(len(data)) + _padded(len(digits))
        if self._in_shard and self._written + len(self._buffer) + size + len(_END) > self._shard_bytes:
            self._close_shard()
        if self._descriptor is None:
            self._open_shard()
        name = f"{self.samples:08d}"
        self._member(f"{name}.{ending}", data)
        offset = self._written + len(self._buffer) - _padded(len(data))
        self._member(f"{name}.cls", digits)
        self._records.append((offset, len(data), label, zlib.crc32(data)))
        self._in_shard += 1
        if len(self._buffer) >= 1 << 20:
            self._flush()

    def finish(self) -> Index:
        """Close the last shard; everything is on the disk afterwards."""
        if self._descriptor is not None:
            self._close_shard()
        return np.array(self._records, dtype=INDEX_DTYPE)

    def abandon(self) -> None:
        """Stop writing; what was written is of no use."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _member(self, name: str, data: bytes) -> None:
        self._buffer += _header(name, len(data))
        self._buffer += data
        self._buffer += bytes(-len(data) % _BLOCK)

    def _open_shard(self) -> None:
        path = self._directory / f"shard-{len(self.shards):06d}.tar"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self._written = self._in_shard = 0

    def _flush(self) -> None:
        assert self._descriptor is not None
        self._digest.update(self._buffer)
        rest = memoryview(self._buffer)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        rest.release()
        self._written += len(self._buffer)
        self._buffer = bytearray()

    def _close_shard(self) -> None:
        assert self._descriptor is not None
        self._buffer += _END
        self._flush()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
        self.shards.append(
            ShardRecord(
                name=f"shard-{len(self.shards):06d}.tar",
                bytes=self._written,
                sha256=self._digest.hexdigest(),
                samples=self._in_shard,
            )
        )


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _header(name: str, size: int) -> bytes:
    """POSIX.1-1988 (ustar) header of a regular file: mode 444, owner 0, time 0."""
    fields = b"".join(
        (
            name.encode("ascii").ljust(100, b"\0"),
            b"0000444\0",
            b"0000000\0",
            b"0000000\0",
            b"%011o\0" % size,
            b"%011o\0" % 0,
            b"        ",  # the checksum counts as spaces while it is summed
            b"0",
            bytes(100),
            b"ustar\x0000",
        )
    ).ljust(_BLOCK, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]
