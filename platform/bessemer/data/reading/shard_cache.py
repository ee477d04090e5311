"""Verified copies of remote shards on this node's disk, shared by all of its processes.

The directory holds, for each file, ``<sha256>`` once it is whole and ``<sha256>.part`` while it is fetched. Names are
hashes, so data sets cannot be mistaken for each other, and those that share shards share copies. Locks are `flock`s on
the files themselves: the kernel lets go of them when a process dies, so nothing can be left locked.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bessemer.data.manifest import FileRecord
from bessemer.data.reading.shard_files import LocalShards, _Handle
from bessemer.errors import DataError
from bessemer.files import file_sha256
from bessemer.stores.store import Store

__all__ = ["CachedShards", "ShardCache", "default_cache_directory"]

_log = logging.getLogger(__name__)
_TRIES = 2
"""Downloads with another hash until it is the store's fault."""
_PATIENCE = 120.0
"""Seconds to wait for room while every file is being read or fetched."""
_PART = ".part"


def default_cache_directory() -> Path:
    """``$XDG_CACHE_HOME/bessemer/shards``, below ``~/.cache`` where the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bessemer" / "shards"


class ShardCache:
    """A directory of verified files, bounded in size. The files that were read longest ago make room for new ones.

    Processes and threads may share the directory in any number; a file is downloaded by one of them while the others
    wait for it. A file that is being read is never removed.

    Args:
        directory: made if it is not there; on a disk of this node, since `flock` must work.
        limit: bytes that all files may have together.

    Raises:
        DataError: the directory cannot be made.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory = directory
        self.limit = limit
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {directory} cannot be made: {error.strerror}; name a directory on a disk of the node"
            ) from None

    def path(self, record: FileRecord) -> Path:
        """Where a file lies once it was fetched."""
        return self.directory / record.sha256

    def holds(self, record: FileRecord) -> bool:
        """Whether the file is here, with its size."""
        try:
            return self.path(record).stat().st_size == record.bytes
        except OSError:
            return False

    def touch(self, record: FileRecord) -> None:
        """Note that the file was used, or will be soon."""
        with suppress(OSError):
            os.utime(self.path(record))

    def fetch(self, store: Store, record: FileRecord) -> None:
        """Download a file unless it is here. Its size and hash are verified before it gets its name.

        Raises:
            DataError: the file is larger than the cache, the disk refuses, or the store's file is another one.
            StoreError: it cannot be read.
        """
        if self.holds(record):
            return
        if record.bytes > self.limit:
            raise DataError(
                f"data.cache_gb: {self.limit / 1e9:g} is less than {store.shown(record.name)} alone, which has "
                f"{record.bytes / 1e9:.3g} GB; raise it"
            )
        try:
            with self._downloading(record) as file:
                if file is not None:
                    self._make_room(file, record)
                    self._download(store, record, file)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.directory} cannot be written: {error.strerror}; make room on the disk, lower "
                f"data.cache_gb, or name another directory"
            ) from None

    def read(self, store: Store, record: FileRecord) -> bytes:
        """The content of a file, fetched if need be, with the right hash.

        Raises:
            DataError, StoreError: as :meth:`fetch`.
        """
        while True:
            self.fetch(store, record)
            if self.damaged(record):
                self.discard(record)
                continue
            with suppress(FileNotFoundError):  # it made room for another file meanwhile
                return self.path(record).read_bytes()

    def damaged(self, record: FileRecord) -> bool:
        """Whether the file is here and its hash is wrong. Reads all of it."""
        try:
            return file_sha256(self.path(record)) != record.sha256
        except FileNotFoundError:
            return False

    def discard(self, record: FileRecord) -> None:
        """Remove a file, so that it is fetched again. Those who read from it keep what they have open."""
        _log.warning("%s is not what it was; it is fetched again", self.path(record))
        self.path(record).unlink(missing_ok=True)

    @contextmanager
    def _downloading(self, record: FileRecord) -> Iterator[BinaryIO | None]:
        """The file to download to, once nobody else does; None if it is no longer needed."""
        part = self.path(record).with_name(record.sha256 + _PART)
        while True:
            with part.open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_at(lock, part):
                    continue  # another process finished or gave up while we waited
                if self.holds(record):
                    part.unlink()
                    yield None
                    return
                try:
                    with part.open("r+b") as file:  # whatever a killed process left is written over
                        yield file
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                return

    def _download(self, store: Store, record: FileRecord, file: BinaryIO) -> None:
        part = Path(file.name)
        for left in reversed(range(_TRIES)):
            file.seek(0)
            store.download(record.name, file, size=record.bytes)
            file.flush()
            found = file_sha256(part)
            if found == record.sha256:
                os.fsync(file.fileno())
                part.replace(self.path(record))
                return
            if left:
                _log.warning("%s came with another hash; once more", store.shown(record.name))
        raise DataError(
            f"{store.shown(record.name)}: its sha256 is {found[:12]}..., the manifest says {record.sha256[:12]}...; "
            f"the store's copy is damaged or of another data set: upload it again from where it was packed"
        )

    def _make_room(self, file: BinaryIO, record: FileRecord) -> None:
        """Remove old files until this one fits, and reserve its bytes."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with (self.directory / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A file on its way has its full length from here on, so that others count it.
                os.ftruncate(file.fileno(), 0)
                if self._evict(self.limit - record.bytes):
                    os.ftruncate(file.fileno(), record.bytes)
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"data.cache_gb: {self.limit / 1e9:g} is too small: every file in {self.directory} is being read, "
                    f"and {record.name} ({record.bytes / 1e9:.3g} GB) does not fit beside them; raise it"
                )
            time.sleep(0.05)

    def _evict(self, most: int) -> bool:
        """Remove the files used longest ago that nobody reads until at most `most` bytes are left; whether it did."""
        files: list[tuple[bool, float, int, Path]] = []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):
                state = path.stat()
                # What a killed process left goes first.
                files.append((path.suffix != _PART, state.st_mtime, state.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for _, _, size, path in sorted(files):
            if total <= most:
                break
            if path.name != "lock" and _remove_unused(path):
                total -= size
        return total <= most


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process reads or downloads it."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


class CachedShards(LocalShards):
    """Shards of a store, read from this node's copies; a shard that is not here is fetched first."""

    def __init__(self, store: Store, records: Sequence[FileRecord], cache: ShardCache):
        super().__init__([cache.path(record) for record in records])
        self.store, self.records, self.cache = store, records, cache

    def fetch(self, shard: int) -> None:
        """Bring a shard here, as :meth:`ShardCache.fetch` does."""
        self.cache.fetch(self.store, self.records[shard])

    def repair(self, shard: int) -> bool:
        """Let a shard be fetched again if this node's copy is not what it was; and read it once more in any case."""
        super().repair(shard)
        if self.cache.damaged(self.records[shard]):
            self.cache.discard(self.records[shard])
        return True

    def _acquire(self, shard: int) -> _Handle:
        while True:
            self.fetch(shard)
            with self._lock:
                try:
                    handle = self._use(shard)
                except FileNotFoundError:
                    continue  # it made room for another shard meanwhile
                if os.fstat(handle.descriptor).st_nlink:
                    self.cache.touch(self.records[shard])
                    return handle
                # Removed while nobody here read it; its room is only free when we let go of it.
                self._retire(shard)
                self._release(handle)

    def _first_use(self, handle: _Handle) -> None:
        fcntl.flock(handle.descriptor, fcntl.LOCK_SH)  # who removes files holds it for a moment at most

    def _last_use(self, handle: _Handle) -> None:
        fcntl.flock(handle.descriptor, fcntl.LOCK_UN)
