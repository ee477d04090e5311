"""Files below a directory."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from bessemer.errors import StoreError
from bessemer.files import sync, write_atomically
from bessemer.stores.store import Patience, Store

__all__ = ["LocalStore"]

_BLOCK = 1 << 22


class LocalStore(Store):
    """Files below a directory, given by its path or as ``file:///path``. Hidden files are nobody's objects.

    The directory need not exist before something is put there.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__(url, patience)
        if url.startswith("file:"):
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost") or not parts.path:
                raise StoreError(f"{url}: names no file of this machine; write file:///PATH.")
            self.root = Path(unquote(parts.path))
        else:
            self.root = Path(url)

    def _path(self, name: str) -> Path:
        return self.root / self.checked(name)

    def _error(self, name: str, error: OSError) -> StoreError:
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return self.missing(name)
        return self.failed(name, error.strerror or repr(error), "check the disk and its permissions")

    def size(self, name: str) -> int:
        path = self._path(name)
        try:
            if not path.is_file():
                raise self.missing(name)
            return path.stat().st_size
        except OSError as e:
            raise self._error(name, e) from None

    def _copy(self, name: str, file: BinaryIO, start: int, stop: int | None, size: int | None) -> None:
        try:
            source = self._path(name).open("rb")
        except OSError as e:
            raise self._error(name, e) from None
        with source:
            end = source.seek(0, 2)
            if size is not None and end != size:
                raise self.failed(name, f"has {end} bytes, expected {size}", "it was replaced or cut; store it again")
            if start > end or (stop or 0) > end:
                raise self.failed(
                    name, f"has {end} bytes, {start} to {stop or 'the end'} were asked for", "it is not what it was"
                )
            position = source.seek(start)
            end = end if stop is None else stop
            while position < end:
                try:
                    block = source.read(min(_BLOCK, end - position))
                except OSError as e:
                    raise self._error(name, e) from None
                if not block:
                    raise self.failed(name, f"was cut at byte {position} while it was read", "store it again")
                file.write(block)
                position += len(block)

    def put(self, name: str, path: Path) -> None:
        target = self._path(name)
        with path.open("rb") as source:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, lambda file: shutil.copyfileobj(source, file, _BLOCK))
                sync(target.parent)
            except OSError as e:
                raise self.failed(
                    name, f"cannot be written ({e.strerror})", "free space there, or make the directory writable"
                ) from None

    def list(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for path in sorted(self.root.rglob("*")):
            parts = path.relative_to(self.root).parts
            name = "/".join(parts)
            if name.startswith(prefix) and not any(part.startswith(".") for part in parts):
                with contextlib.suppress(OSError):  # deleted since
                    if path.is_file():
                        found[name] = path.stat().st_size
        return found

    def delete(self, name: str) -> None:
        try:
            path = self._path(name)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            with contextlib.suppress(OSError):  # holds other files; other stores know no empty directories
                while (path := path.parent) != self.root:
                    path.rmdir()
        except OSError as e:
            raise self.failed(name, f"cannot be deleted ({e.strerror})", "make the directory writable") from None
