"""Reading samples of a packed data set by id."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bessemer.data.decode import decode_into
from bessemer.data.index import Index, parse_index
from bessemer.data.manifest import Manifest
from bessemer.errors import DataError
from bessemer.files import file_sha256

__all__ = ["ShardedDataset"]

_OPEN_SHARDS = 128


class ShardedDataset:
    """A packed data set. Samples are read with one `pread` each, checked against their crc32, and decoded.

    Open with :meth:`open`; any number of threads may read. Ids number the samples of all shards in order.
    """

    def __init__(self, directory: Path, manifest: Manifest, index: Index):
        self.directory = directory
        self.manifest = manifest
        self._offsets: NDArray[np.int64] = index["offset"]
        self._lengths: NDArray[np.uint32] = index["length"]
        self._crc32: NDArray[np.uint32] = index["crc32"]
        self.labels: NDArray[np.int64] = index["label"].astype(np.int64)
        """[n] int64 class indices."""
        self.labels.flags.writeable = False
        self.shard_counts = [shard.samples for shard in manifest.shards]
        """Samples of each shard."""
        self._ends = np.cumsum(self.shard_counts)
        self._files = _OpenFiles([directory / shard.name for shard in manifest.shards])

    @classmethod
    def open(cls, path: str | Path, verify: Literal["sizes", "sha256"] = "sizes") -> ShardedDataset:
        """Open a packed data set and check it against its manifest.

        Args:
            path: directory that `bessemer data pack` wrote.
            verify: `sizes` checks that every shard is there with its size and that the index is undamaged;
                `sha256` reads all shards and checks their hashes too.

        Raises:
            DataError: files are missing or differ; names them.
        """
        directory = Path(path)
        manifest = Manifest.load(directory)
        _check_shards(directory, manifest, verify)
        return cls(directory, manifest, _read_index(directory, manifest))

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.manifest.channels, self.manifest.resolution, self.manifest.resolution

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Decoded images.

        Args:
            ids: [N] sample ids, each in ``range(len(self))``.

        Returns:
            [N, C, H, W] uint8.

        Raises:
            DataError: a sample is damaged; names shard, key and offset.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
            raise IndexError(f"ids {int(ids.min())}..{int(ids.max())} of a data set of {len(self)} samples")
        channels, height, width = self.shape
        images = np.empty((len(ids), height, width, channels), dtype=np.uint8)
        shards = np.searchsorted(self._ends, ids, side="right")
        for shard in np.unique(shards).tolist():
            with self._files.opened(shard) as descriptor:
                for row in np.flatnonzero(shards == shard).tolist():
                    self._read_one(int(ids[row]), shard, descriptor, images[row])
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def close(self) -> None:
        """Close the shards. Reading again opens them again."""
        self._files.close()

    def __enter__(self) -> ShardedDataset:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read_one(self, number: int, shard: int, descriptor: int, out: NDArray[np.uint8]) -> None:
        length = int(self._lengths[number])
        try:
            data = os.pread(descriptor, length, int(self._offsets[number]))
            if len(data) != length:
                raise ValueError(f"the shard ends {length - len(data)} bytes too early")
            if zlib.crc32(data) != self._crc32[number]:
                raise ValueError("its bytes changed since it was packed (crc32 differs)")
            decode_into(data, out)
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.directory / self.manifest.shards[shard].name}: sample {number:08d} at byte "
                f"{int(self._offsets[number])} is damaged: {error}; copy the shard again from where it was packed, or "
                f"pack the data set anew"
            ) from None


class _OpenFiles:
    """File descriptors of the shards most recently read, so that sets of many shards stay within the limit."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, oldest use first
        self._users: dict[int, int] = {}  # shard -> threads that read from it

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        """A descriptor that stays open within the block."""
        with self._lock:
            if shard not in self._open:
                try:
                    self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise DataError(
                        f"{self._paths[shard]} cannot be opened: {error.strerror}; put the shard back, or pack the "
                        f"data set anew"
                    ) from None
            self._open.move_to_end(shard)
            self._users[shard] = self._users.get(shard, 0) + 1
            descriptor = self._open[shard]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[shard] -= 1
                self._close_unused(keep=_OPEN_SHARDS)

    def close(self) -> None:
        with self._lock:
            self._close_unused(keep=0)

    def _close_unused(self, keep: int) -> None:
        for shard in [shard for shard in self._open if not self._users.get(shard)]:
            if len(self._open) <= keep:
                return
            os.close(self._open.pop(shard))


def _check_shards(directory: Path, manifest: Manifest, verify: str) -> None:
    missing: list[str] = []
    wrong: list[str] = []
    for shard in manifest.shards:
        path = directory / shard.name
        try:
            size = path.stat().st_size
        except OSError:
            missing.append(shard.name)
            continue
        if size != shard.bytes:
            wrong.append(f"{shard.name} has {size} bytes instead of {shard.bytes}")
        elif verify == "sha256" and file_sha256(path) != shard.sha256:
            wrong.append(f"{shard.name} has other content (sha256 differs)")
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(manifest.shards)} shards are missing: {_some(missing)}")
    if wrong:
        faults.append(f"{len(wrong)} of {len(manifest.shards)} shards are damaged: {_some(wrong)}")
    if faults:
        raise DataError(
            f"data set {directory}: {'; '.join(faults)}; copy them again from where they were packed, or pack the data "
            f"set anew with `bessemer data pack SOURCE {directory} --overwrite`"
        )


def _read_index(directory: Path, manifest: Manifest) -> Index:
    path = directory / manifest.index.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; copy it again from where it was packed, or pack the data set "
            f"anew"
        ) from None
    index = parse_index(
        data,
        path,
        shard_bytes=[shard.bytes for shard in manifest.shards],
        shard_samples=[shard.samples for shard in manifest.shards],
        class_counts=list(manifest.class_counts),
    )
    # After the parser, which says what is wrong; this says that something is.
    if file_sha256(path) != manifest.index.sha256:
        raise DataError(
            f"{path}: its content differs from the manifest (sha256); copy it again from where it was packed, or pack "
            f"the data set anew"
        )
    return index


def _some(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
