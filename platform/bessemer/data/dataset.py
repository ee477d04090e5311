"""Reading samples of a packed data set by id."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.data.decode import decode_into
from bessemer.data.index import Index, parse_index
from bessemer.data.manifest import Manifest
from bessemer.data.shard_files import LocalShards
from bessemer.errors import DataError
from bessemer.files import file_sha256

__all__ = ["ShardedDataset"]


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
        self._labels: NDArray[np.uint32] = index["label"]
        self.shard_counts = [shard.samples for shard in manifest.shards]
        """Samples of each shard."""
        self._ends = np.cumsum(self.shard_counts)
        self._files = LocalShards([directory / shard.name for shard in manifest.shards])

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
    def labels(self) -> NDArray[np.int64]:
        """[n] int64 class indices; made anew, so keep them."""
        return self._labels.astype(np.int64)

    def labels_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N] int64 class indices of these samples."""
        return self._labels[ids].astype(np.int64)

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
        self.read_into(ids, images)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def read_into(self, ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Decode images straight into `out`, pixels as the decoder lays them.

        Args:
            ids: [N] sample ids, each in ``range(len(self))``.
            out: [N, H, W, C] uint8, C-contiguous.

        Raises:
            DataError: a sample is damaged; names shard, key and offset.
        """
        shards = np.searchsorted(self._ends, ids, side="right")
        numbers, offsets = ids.tolist(), self._offsets[ids].tolist()
        lengths, checksums = self._lengths[ids].tolist(), self._crc32[ids].tolist()
        for shard in np.unique(shards).tolist():
            with self._files.opened(shard) as descriptor:
                for row in np.flatnonzero(shards == shard).tolist():
                    place = _Place(numbers[row], shard, offsets[row], lengths[row], checksums[row])
                    self._read_one(place, descriptor, out[row])

    def close(self) -> None:
        """Close the shards. Reading again opens them again."""
        self._files.close()

    def __enter__(self) -> ShardedDataset:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read_one(self, place: _Place, descriptor: int, out: NDArray[np.uint8]) -> None:
        try:
            data = os.pread(descriptor, place.length, place.offset)
            if len(data) != place.length:
                raise ValueError(f"the shard ends {place.length - len(data)} bytes too early")
            if zlib.crc32(data) != place.crc32:
                raise ValueError("its bytes changed since it was packed (crc32 differs)")
            decode_into(data, out)
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.directory / self.manifest.shards[place.shard].name}: sample {place.number:08d} at byte "
                f"{place.offset} is damaged: {error}; copy the shard again from where it was packed, or "
                f"pack the data set anew"
            ) from None


class _Place(NamedTuple):
    """Where a sample lies, and its checksum."""

    number: int
    shard: int
    offset: int
    length: int
    crc32: int


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
