"""Reading the files inside archives. Nothing is ever extracted: no path in an archive names a file on this machine.

Compressed tars are decompressed once into a spool, a scratch file beside the shards that are being made; then every
archive gives random access to its members.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from bessemer.data.sources.tars import read_members
from bessemer.errors import DataError
from bessemer.files import write_atomically

__all__ = ["ExtentFiles", "Files", "FolderFiles", "ZipFiles", "file_stamp", "open_archive", "open_tars"]

_BLOCK = 512
_COMPRESSED = {b"\xfd7zXZ\x00": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)


class Files(Protocol):
    """Files by relative path. `read` may be called from several threads."""

    @property
    def paths(self) -> list[PurePosixPath]:
        """All regular files, in no particular order."""
        ...

    @property
    def links(self) -> int:
        """Links that were left out."""
        ...

    def read(self, path: PurePosixPath) -> bytes | NDArray[np.uint8]:
        """Content of one file, or pixels [H, W, C] where the source holds arrays; ValueError when it is damaged."""
        ...

    def part(self, paths: Iterable[PurePosixPath]) -> Files:
        """Only these files: small to send to another process, which opens for itself what it reads."""
        ...

    def stamp(self) -> str:
        """Another text when the files changed, judged by sizes and times."""
        ...

    def close(self) -> None: ...


class FolderFiles:
    """Files below a folder."""

    def __init__(self, folder: Path, paths: list[PurePosixPath]):
        self.folder = folder
        self.paths = paths
        self.links = 0

    @classmethod
    def below(cls, folder: Path) -> FolderFiles:
        """All files below a folder. Links to folders are followed, once each."""
        paths: list[PurePosixPath] = []
        seen: set[tuple[int, int]] = set()
        for here, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
            status = Path(here).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            relative = PurePosixPath(Path(here).relative_to(folder).as_posix())
            paths.extend(relative / name for name in files)
        return cls(folder.absolute(), paths)

    def read(self, path: PurePosixPath) -> bytes:
        try:
            return (self.folder / path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None

    def part(self, paths: Iterable[PurePosixPath]) -> FolderFiles:
        return FolderFiles(self.folder, list(paths))

    def stamp(self) -> str:
        return "".join(f"{path} {file_stamp(self.folder / path)}\n" for path in sorted(self.paths))

    def close(self) -> None:
        pass


class ZipFiles:
    """Members of a zip archive; zipfile checks their crc32.

    Args:
        archive: the file.
        members: path -> name in the archive.
    """

    links = 0

    def __init__(self, archive: Path, members: dict[PurePosixPath, str]):
        self._archive = archive.absolute()
        self._members = members
        self._zip: zipfile.ZipFile | None = None
        self._lock = threading.Lock()

    @classmethod
    def within(cls, archive: Path) -> ZipFiles:
        """All files in an archive."""
        try:
            with zipfile.ZipFile(archive) as opened:
                names = [name for name in opened.namelist() if not name.endswith("/")]
        except Exception as error:  # zipfile raises whatever a damaged directory makes it raise
            raise DataError(f"{archive}: this zip archive is damaged or cut off ({error}); copy it again") from None
        return cls(archive, {_safe(name, archive): name for name in names})

    @property
    def paths(self) -> list[PurePosixPath]:
        return list(self._members)

    def read(self, path: PurePosixPath) -> bytes:
        try:
            with self._lock:
                self._zip = self._zip or zipfile.ZipFile(self._archive)
            return self._zip.read(self._members[path])
        except RuntimeError:  # among them NotImplementedError: a compression that zipfile does not know
            raise ValueError("encrypted, or compressed in a way that cannot be read") from None
        except Exception as error:  # as above
            raise ValueError(f"damaged in the archive: {error}") from None

    def part(self, paths: Iterable[PurePosixPath]) -> ZipFiles:
        return ZipFiles(self._archive, {path: self._members[path] for path in paths})

    def stamp(self) -> str:
        return file_stamp(self._archive)

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
            self._zip = None

    def __reduce__(self) -> tuple[type[ZipFiles], tuple[Any, ...]]:
        return ZipFiles, (self._archive, self._members)


class ExtentFiles:
    """Files that lie one after the other in a few large ones, such as tars.

    Args:
        containers: the large files.
        extents: path -> number of its container, first byte, length.
        links: links that were left out.
        stamp: of what the containers were made from; None takes their own.
    """

    def __init__(
        self,
        containers: list[Path],
        extents: dict[PurePosixPath, tuple[int, int, int]],
        links: int = 0,
        stamp: str | None = None,
    ):
        self._containers = [path.absolute() for path in containers]
        self._extents = extents
        self.links = links
        self._stamp = "\n".join(map(file_stamp, containers)) if stamp is None else stamp
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def paths(self) -> list[PurePosixPath]:
        return list(self._extents)

    def read(self, path: PurePosixPath) -> bytes:
        container, offset, size = self._extents[path]
        try:
            data = os.pread(self._descriptor(container), size, offset)
        except OSError as error:
            raise ValueError(f"{self._containers[container]} cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise ValueError("cut off in the archive")
        return data

    def part(self, paths: Iterable[PurePosixPath]) -> ExtentFiles:
        return ExtentFiles(self._containers, {path: self._extents[path] for path in paths}, stamp=self._stamp)

    def stamp(self) -> str:
        return self._stamp

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def __reduce__(self) -> tuple[type[ExtentFiles], tuple[Any, ...]]:
        return ExtentFiles, (self._containers, self._extents, self.links, self._stamp)

    def _descriptor(self, container: int) -> int:
        with self._lock:
            if container not in self._open:
                self._open[container] = os.open(self._containers[container], os.O_RDONLY | os.O_CLOEXEC)
            return self._open[container]


def file_stamp(path: Path) -> str:
    """Size and time of a file; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def open_tars(tars: list[tuple[str, Path]], *, stamp: str | None = None) -> ExtentFiles:
    """The files in tars that are not compressed.

    Args:
        tars: name and place of each; with more than one, the files of a tar lie below its name.
        stamp: of what the tars were made from; None takes their own.

    Raises:
        DataError: headers do not account for every byte; see :func:`bessemer.data.sources.tars.read_members`.
    """
    extents: dict[PurePosixPath, tuple[int, int, int]] = {}
    links = 0
    for number, (name, path) in enumerate(tars):
        below = PurePosixPath(name) if len(tars) > 1 else PurePosixPath()
        for member in read_members(path, name=name):
            if member.kind == "file":
                # A path that comes again replaces the earlier one, as it does when a tar is extracted.
                extents[below / _safe(member.name, name)] = (number, member.offset, member.size)
            elif member.kind == "other":
                links += 1
    return ExtentFiles([path for _, path in tars], extents, links, stamp)


def open_archive(archive: Path, spool_folder: Path) -> Files:
    """Open an archive of any known type, judged by its first bytes and not by its name.

    Raises:
        DataError: the type is unknown or the archive is damaged.
    """
    try:
        with archive.open("rb") as file:
            start = file.read(_BLOCK)
    except OSError as error:
        raise DataError(f"{archive} cannot be read: {error.strerror}; check its permissions") from None
    if start.startswith(_ZIP):
        return ZipFiles.within(archive)
    if _compression(start) or start[257:262] == b"ustar":
        plain = _plain_tar(archive, spool_folder)
        return open_tars([(str(archive), plain)], stamp=file_stamp(archive))
    raise DataError(
        f"{archive}: unknown archive type (it starts with {start[:8]!r}); a source is a folder, a .tar, .tar.gz, "
        f".tar.xz, .tar.zst, .tar.bz2 or .zip archive, an .npy, .npz or .parquet file, or the word digits"
    )


def _compression(start: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def _plain_tar(archive: Path, spool_folder: Path) -> Path:
    """The archive itself, or its decompressed copy."""
    with archive.open("rb") as file:
        kind = _compression(file.read(8))
        if kind is None:
            return archive
        # By this name an interrupted packer finds it again, unless the archive changed.
        digest = hashlib.sha256(f"{archive.absolute()} {file_stamp(archive)}".encode()).hexdigest()
        spool = spool_folder / f"spool-{digest[:16]}.tar"
        if spool.exists():
            return spool
        file.seek(0)
        try:
            with _decompressed(file, kind) as plain:
                write_atomically(spool, lambda copy: shutil.copyfileobj(plain, copy, 1 << 20))
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{archive}: cannot be decompressed into {spool_folder}: {error.strerror}") from None
            raise DataError(f"{archive}: this {kind} archive is damaged or cut off ({error}); copy it again") from None
    return spool


def _decompressed(file: IO[bytes], kind: str) -> IO[bytes]:
    if kind == "xz":
        return cast("IO[bytes]", lzma.open(file))
    if kind == "gzip":
        return cast("IO[bytes]", gzip.open(file))
    if kind == "bzip2":
        return cast("IO[bytes]", bz2.open(file))
    return cast("IO[bytes]", _StrictZstd(file))


class _StrictZstd:
    """Zstandard frames end to end; unlike `stream_reader`, says so when the last one is cut off."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor().decompressobj()
        self._rest = b""
        self._within_frame = False

    def read(self, _size: int) -> bytes:
        while True:
            data = self._rest or self._file.read(1 << 17)
            self._rest = b""
            if not data:
                if self._within_frame:
                    raise EOFError("the compressed data ends before its end marker")
                return b""
            if self._decompressor.eof:
                self._decompressor = zstandard.ZstdDecompressor().decompressobj()
            plain = self._decompressor.decompress(data)
            self._within_frame = not self._decompressor.eof
            self._rest = self._decompressor.unused_data if self._decompressor.eof else b""
            if plain:
                return plain

    def __enter__(self) -> _StrictZstd:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _refuse_folder(error: OSError) -> None:
    # os.walk would leave the folder out and say nothing.
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror}; check its permissions")


def _safe(name: str, archive: Path | str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{archive}: member {name!r} leads out of the archive; such archives are refused: pack "
            f"the images anew with relative paths"
        )
    return path
