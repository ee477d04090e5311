"""Reading the files inside archives. Nothing is ever extracted: no path in an archive names a file on this machine.

Compressed tars are decompressed once into a spool, a nameless scratch file that vanishes with the process; then
every archive gives random access to its members.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

import zstandard

from bessemer.errors import DataError

__all__ = ["Files", "FolderFiles", "TarFiles", "ZipFiles", "open_archive"]

_BLOCK = 512
_COMPRESSED = {b"\xfd7zXZ\x00": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)


class Files(Protocol):
    """Files by relative path. `read` may be called from several threads."""

    paths: list[PurePosixPath]
    """All regular files, in no particular order."""
    links: int
    """Links that were left out."""

    def read(self, path: PurePosixPath) -> bytes:
        """Content of one file; ValueError when it is damaged."""
        ...

    def close(self) -> None: ...


class FolderFiles:
    """Files below a folder. Links to folders are followed, once each."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.links = 0
        self.paths: list[PurePosixPath] = []
        seen: set[tuple[int, int]] = set()
        for here, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
            status = Path(here).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            relative = PurePosixPath(Path(here).relative_to(folder).as_posix())
            self.paths.extend(relative / name for name in files)

    def read(self, path: PurePosixPath) -> bytes:
        try:
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None

    def close(self) -> None:
        pass


class ZipFiles:
    """Members of a zip archive; zipfile checks their crc32."""

    def __init__(self, archive: Path):
        try:
            self._zip = zipfile.ZipFile(archive)
        except Exception as error:  # zipfile raises whatever a damaged directory makes it raise
            raise DataError(f"{archive}: this zip archive is damaged or cut off ({error}); copy it again") from None
        self.links = 0
        self._members = {
            _safe(info.filename, archive): info for info in self._zip.infolist() if not info.filename.endswith("/")
        }
        self.paths = list(self._members)

    def read(self, path: PurePosixPath) -> bytes:
        try:
            return self._zip.read(self._members[path])
        except RuntimeError:  # among them NotImplementedError: a compression that zipfile does not know
            raise ValueError("encrypted, or compressed in a way that cannot be read") from None
        except Exception as error:  # as above
            raise ValueError(f"damaged in the archive: {error}") from None

    def close(self) -> None:
        self._zip.close()


class TarFiles:
    """Members of a tar archive, plain or compressed.

    tarfile takes a damaged header for the end of the archive and says nothing; so after the last member everything
    up to the end of the file must be zeros, as the format wants it, or the archive is refused.
    """

    def __init__(self, archive: Path, spool_folder: Path):
        self._file = _plain_tar(archive, spool_folder)
        self.links = 0
        self._members: dict[PurePosixPath, tuple[int, int]] = {}
        try:
            self._list(archive)
        except BaseException as error:
            self.close()
            if isinstance(error, DataError) or not isinstance(error, Exception):
                raise
            # tarfile raises whatever a damaged header makes it raise
            raise DataError(f"{archive}: this tar archive is damaged or cut off ({error}); copy it again") from None
        self.paths = list(self._members)

    def _list(self, archive: Path) -> None:
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    # A path that comes again replaces the earlier one, as it does when a tar is extracted.
                    self._members[_safe(member.name, archive)] = (member.offset_data, member.size)
                elif not member.isdir():
                    self.links += 1
            end: int = cast("Any", tar).offset
        self._file.seek(end)
        length = 0
        while block := self._file.read(1 << 20):
            length += len(block)
            if block.count(0) != len(block):
                length = 0
                break
        if length < _BLOCK:
            raise tarfile.ReadError(f"its member list breaks off at byte {end} after {len(self._members)} files")

    def read(self, path: PurePosixPath) -> bytes:
        offset, size = self._members[path]
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise ValueError("cut off in the archive")
        return data

    def close(self) -> None:
        self._file.close()


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
        return ZipFiles(archive)
    if _compression(start) or start[257:262] == b"ustar":
        return TarFiles(archive, spool_folder)
    raise DataError(
        f"{archive}: unknown archive type (it starts with {start[:8]!r}); a source is a folder, a .tar, .tar.gz, "
        f".tar.xz, .tar.zst, .tar.bz2 or .zip archive, or the word digits"
    )


def _compression(start: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def _plain_tar(archive: Path, spool_folder: Path) -> IO[bytes]:
    """The archive itself, or its decompressed copy in a nameless file."""
    file = archive.open("rb")
    kind = _compression(file.read(8))
    file.seek(0)
    if kind is None:
        return file
    spool = cast("IO[bytes]", tempfile.TemporaryFile(dir=spool_folder))  # noqa: SIM115 (the caller closes it)
    try:
        with file, _decompressed(file, kind) as plain:
            shutil.copyfileobj(plain, spool, 1 << 20)
        spool.flush()
        spool.seek(0)
    except _DAMAGED as error:
        spool.close()
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{archive}: cannot be decompressed into {spool_folder}: {error.strerror}") from None
        raise DataError(f"{archive}: this {kind} archive is damaged or cut off ({error}); copy it again") from None
    except BaseException:
        spool.close()
        raise
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


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{archive}: member {name!r} leads out of the archive; such archives are refused: pack "
            f"the images anew with relative paths"
        )
    return path
