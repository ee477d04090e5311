"""Reading samples of a packed data set by id."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.data.index import Index, parse_index
from bessemer.data.manifest import MANIFEST, Manifest
from bessemer.data.reading.quarantine import BadSample, Quarantine
from bessemer.data.reading.shard_cache import CachedShards, ShardCache, default_cache_directory
from bessemer.data.reading.shard_files import LocalShards
from bessemer.errors import DataError, some
from bessemer.files import file_sha256
from bessemer.stores.opening import is_remote, open_store
from bessemer.stores.store import MissingObjectError, Store

__all__ = ["CACHE_BYTES", "ShardedDataset", "load_manifest", "read_index"]

CACHE_BYTES = 50 * 10**9
"""Size of the node's cache of remote shards where nothing else is asked for."""

_FIX = "copy it again from where it was packed, or pack the data set anew"


class ShardedDataset:
    """A packed data set. Samples are read with one `pread` each, checked against their crc32, and decoded.

    Open with :meth:`open`; any number of threads may read. Ids number the samples of all shards in order.
    """

    def __init__(
        self, place: str, manifest: Manifest, index: Index, shards: LocalShards, quarantine: Quarantine | None = None
    ):
        self.place = place
        """Directory or URL, for messages."""
        self.manifest = manifest
        # Views of the file as it is, [samples, members]: 20 bytes per record, and no more.
        self._offsets: NDArray[np.int64] = index["offset"]
        self._lengths: NDArray[np.uint32] = index["length"]
        self._crc32: NDArray[np.uint32] = index["crc32"]
        self._labels: NDArray[np.uint32] = index["label"][:, 0]
        self.fields = tuple(manifest.sample_fields)
        """What each sample holds."""
        self.shard_counts = [shard.samples for shard in manifest.shards]
        """Samples of each shard."""
        self._ends = np.cumsum(self.shard_counts)
        self.shards = shards
        self.quarantine = quarantine
        """What replaces damaged samples; None stops at the first."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        verify: Literal["sizes", "sha256"] = "sizes",
        *,
        cache: ShardCache | None = None,
        store: Store | None = None,
        quarantine: Quarantine | None = None,
    ) -> ShardedDataset:
        """Open a packed data set and check it against its manifest.

        Args:
            path: directory that `bessemer data pack` wrote, or the URL of a copy of it, such as ``s3://bucket/set``.
            verify: for directories, `sizes` checks that every shard is there with its size and that the index is
                undamaged; `sha256` reads all shards and checks their hashes too. Shards from a URL are checked when
                they are fetched, always by size and hash.
            cache: where shards from a URL are kept on this node; unset for the user's cache directory.
            store: the store at `path`, where it is not one that :func:`bessemer.stores.open_store` opens.
            quarantine: replaces damaged samples; unset stops at the first.

        Raises:
            DataError: files are missing or differ; names them.
            StoreError: the store cannot be reached.
        """
        if store is None and is_remote(path):
            store = open_store(path)
        if store is not None:
            cache = cache or ShardCache(default_cache_directory(), CACHE_BYTES)
            manifest = _load_remote_manifest(store)
            index = _check_index(cache.read(store, manifest.index), store.shown(manifest.index.name), manifest)
            shards: LocalShards = CachedShards(store, manifest.shards, cache)
            return cls(store.name, manifest, index, shards, quarantine)
        directory = _directory(path)
        manifest = Manifest.load(directory)
        _check_shards(directory, manifest, verify)
        index = read_index(directory, manifest)
        shards = LocalShards([directory / shard.name for shard in manifest.shards])
        return cls(str(directory), manifest, index, shards, quarantine)

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the main field of one sample: (channels, height, width) of images."""
        return tuple(self.fields[0].shape)

    @property
    def labels(self) -> NDArray[np.int64]:
        """[n] int64 class indices; made anew each time."""
        return self._labels.astype(np.int64)

    def labels_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N] int64 class indices of these samples."""
        return self._labels[ids].astype(np.int64)

    def shards_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N] number of the shard of each sample."""
        return np.searchsorted(self._ends, ids, side="right")

    def read(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Decoded images, or whatever the main field is.

        Args:
            ids: [N] sample ids, each in ``range(len(self))``.

        Returns:
            [N, C, H, W] uint8 images; [N, T, C, H, W] uint8 clips, [N, samples] int16 sound, [N, bits] uint8.

        Raises:
            DataError: a sample is damaged; names shard, key and offset.
        """
        return self.read_fields(ids)[self.fields[0].name]

    def read_fields(self, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """All fields of samples by name; arguments, values and errors as of :meth:`read`."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
            raise IndexError(f"ids {int(ids.min())}..{int(ids.max())} of a data set of {len(self)} samples")
        found = [np.empty((len(ids), *one.stored_shape), dtype=one.stored_dtype) for one in self.fields]
        self.read_into(ids, *found)
        return {one.name: one.laid_out(stored) for one, stored in zip(self.fields, found, strict=True)}

    def read_into(self, ids: NDArray[np.int64], *out: NDArray[Any]) -> None:
        """Decode samples straight into `out`, as the decoder lays them.

        Args:
            ids: [N] sample ids, each in ``range(len(self))``.
            out: [N, *stored_shape] of each field, C-contiguous: [N, H, W, C] uint8 of images.

        Raises:
            DataError: a sample is damaged; names shard, key and offset.
        """
        shards = self.shards_of(ids)
        numbers, offsets = ids.tolist(), self._offsets[ids].tolist()
        lengths, checksums = self._lengths[ids].tolist(), self._crc32[ids].tolist()
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard).tolist()
            places = {row: _Place(numbers[row], shard, offsets[row], lengths[row], checksums[row]) for row in rows}
            for row, reason in self._read_shard(shard, places, out).items():
                self._replace(places[row], reason, row, out)

    def close(self) -> None:
        """Close the shards. Reading again opens them again."""
        self.shards.close()

    def __enter__(self) -> ShardedDataset:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read_shard(self, shard: int, places: Mapping[int, _Place], out: Sequence[NDArray[Any]]) -> dict[int, str]:
        """Decode samples of one shard into rows of `out`; rows that could not be read, and why."""
        known: dict[int, str] = {}
        if self.quarantine is not None and len(self.quarantine):
            reasons = {row: self.quarantine.reason(place.number) for row, place in places.items()}
            known = {row: reason for row, reason in reasons.items() if reason is not None}
        for again in (False, True):
            failed: dict[int, str] = {}
            with self.shards.opened(shard) as descriptor:
                for row, place in places.items():
                    if row not in known and (reason := self._read_sample(descriptor, place, row, out)) is not None:
                        failed[row] = reason
            if not failed or again or not self.shards.repair(shard):
                break
        return known | failed

    def _read_sample(self, descriptor: int, place: _Place, row: int, out: Sequence[NDArray[Any]]) -> str | None:
        """Decode one sample into a row of each of `out`; why not, if it is damaged."""
        member = 0
        for field, into in zip(self.fields, out, strict=True):
            for piece in into[row] if field.members > 1 else into[row : row + 1]:
                offset, length, crc32 = place.offsets[member], place.lengths[member], place.checksums[member]
                try:
                    data = os.pread(descriptor, length, offset)
                    if len(data) != length:
                        raise ValueError(f"the shard ends {length - len(data)} bytes too early")
                    if zlib.crc32(data) != crc32:
                        raise ValueError("its bytes changed since it was packed (crc32 differs)")
                    field.decode(data, piece)
                except (ValueError, OSError) as error:
                    return f"file {member + 1} of it at byte {offset}: {error}" if place.several else str(error)
                member += 1
        return None

    def _replace(self, place: _Place, reason: str, row: int, out: Sequence[NDArray[Any]]) -> None:
        """Put the substitute of a damaged sample in its place, or raise."""
        shard = self.manifest.shards[place.shard].name
        fault = (
            f"{self.place.rstrip('/')}/{shard}: sample {place.number:08d} at byte {place.offset} is damaged: {reason}"
        )
        if self.quarantine is None:
            raise DataError(
                f"{fault}; copy the shard again from where it was packed, pack the data set anew, or let "
                f"data.on_bad_sample: quarantine replace it"
            )
        if self.quarantine.reason(place.number) is None:
            self.quarantine.add(BadSample(place.number, shard, place.offset, reason))
        for number in self.quarantine.candidates(place.number, self._labels):
            if self.quarantine.reason(number) is not None:
                continue
            other = int(self.shards_of(np.array([number]))[0])
            found = _Place(
                number,
                other,
                self._offsets[number].tolist(),
                self._lengths[number].tolist(),
                self._crc32[number].tolist(),
            )
            failed = self._read_shard(other, {row: found}, out)
            if not failed:
                return
            self.quarantine.add(BadSample(number, self.manifest.shards[other].name, found.offset, failed[row]))
        raise DataError(
            f"{fault}; none of its class could replace it: copy the shards again from where they were packed"
        )


class _Place(NamedTuple):
    """Where a sample lies, and the checksums of its files."""

    number: int
    shard: int
    offsets: list[int]
    """Of each of its files."""
    lengths: list[int]
    checksums: list[int]

    @property
    def offset(self) -> int:
        """Of its first file."""
        return self.offsets[0]

    @property
    def several(self) -> bool:
        return len(self.offsets) > 1


def load_manifest(path: str | Path, store: Store | None = None) -> Manifest:
    """The manifest of a packed data set in a directory or at a URL; arguments as for :meth:`ShardedDataset.open`.

    Raises:
        DataError: there is none, or it is damaged.
        StoreError: the store cannot be reached.
    """
    if store is None and not is_remote(path):
        return Manifest.load(_directory(path))
    return _load_remote_manifest(store or open_store(path))


def _directory(path: str | Path) -> Path:
    """The directory of a path or a ``file://`` URL."""
    return open_store(path).root if str(path).startswith("file:") else Path(path)  # type: ignore[attr-defined]


def _load_remote_manifest(store: Store) -> Manifest:
    try:
        data = store.read(MANIFEST)
    except MissingObjectError:
        raise DataError(
            f"data set {store.name} has no {MANIFEST}, so it is no packed data set; pack one and upload the whole "
            f"directory, {MANIFEST} last"
        ) from None
    return Manifest.parse(data, store.shown(MANIFEST))


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
        faults.append(f"{len(missing)} of {len(manifest.shards)} shards are missing: {some(missing)}")
    if wrong:
        faults.append(f"{len(wrong)} of {len(manifest.shards)} shards are damaged: {some(wrong)}")
    if faults:
        raise DataError(
            f"data set {directory}: {'; '.join(faults)}; copy them again from where they were packed, or pack the data "
            f"set anew with `bessemer data pack SOURCE {directory} --overwrite`"
        )


def read_index(directory: Path, manifest: Manifest) -> Index:
    """The index of a data set in a local directory.

    Raises:
        DataError: it is not there, or not as the manifest says.
    """
    path = directory / manifest.index.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {_FIX}") from None
    index = _check_index(data, path, manifest)
    # After the parser, which says what is wrong; this says that something is.
    if file_sha256(path) != manifest.index.sha256:
        raise DataError(f"{path}: its content differs from the manifest (sha256); {_FIX}")
    return index


def _check_index(data: bytes, source: Path | str, manifest: Manifest) -> Index:
    return parse_index(
        data,
        source,
        shard_bytes=[shard.bytes for shard in manifest.shards],
        shard_samples=[shard.samples for shard in manifest.shards],
        class_counts=list(manifest.class_counts),
        members=manifest.members,
    )
