"""Every other kind of store: Google's, Azure's, sftp and what else fsspec knows."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.errors import MachineError, StoreError
from bessemer.stores.reading import Answer, ResumingStore
from bessemer.stores.store import Patience, PerProcess, TransientError

__all__ = ["FsspecStore"]

_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "hdfs": "pyarrow",
    "oci": "ocifs",
    "oss": "ossfs",
}
# Where an object appears only when all of it has arrived. Elsewhere it is put aside and renamed.
_WHOLE_OR_NOTHING = frozenset({"gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"})
# What changes with an object, by the names that file systems have for it.
_VERSIONS = (
    "etag",
    "ETag",
    "generation",
    "md5Hash",
    "content_md5",
    "mtime",
    "last_modified",
    "LastModified",
    "created",
)


class FsspecStore(ResumingStore):
    """Objects below a URL that fsspec understands. Credentials are those of the package that fsspec uses for it."""

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__(url, patience)
        self._scheme = url.partition("://")[0].lower()
        self._opened = PerProcess(self._make)

    def _make(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MachineError(f"{self.name}: needs fsspec; pip install 'bessemer[stores]'.") from None
        try:
            system, path = url_to_fs(self.url)
        except ImportError as e:
            package = _PACKAGES.get(self._scheme)
            fix = f"pip install {package}" if package else str(e)
            raise MachineError(f"{self.name}: {self._scheme}:// needs a package that is not here; {fix}.") from None
        except ValueError as e:
            raise StoreError(
                f"{self.name}: {e}; `python -c 'import fsspec; print(*fsspec.available_protocols())'` "
                "prints what there is."
            ) from None
        except Exception as e:
            raise self.failed("", f"{type(e).__name__}: {e}", "check the address and the credentials") from None
        return system, str(path).rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._opened.get()[0]

    def _path(self, name: str) -> str:
        return f"{self._opened.get()[1]}/{self.checked(name)}"

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn whatever a file system raises into ours: what is not plainly final may go away by itself."""
        try:
            yield
        except (StoreError, MachineError, TransientError):
            raise
        except FileNotFoundError:
            raise self.missing(name) from None
        except (PermissionError, NotImplementedError) as e:
            raise self.failed(
                name, f"{type(e).__name__}: {e}", "check the credentials and what they may do there"
            ) from None
        except Exception as e:
            if "Credentials" in type(e).__name__:
                raise self.failed(name, f"no credentials ({e})", "log in as its package says") from None
            raise TransientError(f"{type(e).__name__}: {e}") from None

    def _info(self, name: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        info: dict[str, Any] = self._fs.info(self._path(name))
        if info.get("type") == "directory":
            raise self.missing(name)
        return info

    @contextlib.contextmanager
    def _open(self, name: str, start: int, stop: int | None, version: str | None) -> Iterator[Answer]:  # noqa: ARG002
        with self._errors(name):
            info = self._info(name)
            file = self._fs.open(self._path(name), "rb")
        found = next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key) is not None), None)

        def read(amount: int) -> bytes:
            with self._errors(name):
                data: bytes = file.read(amount)
                return data

        try:
            with self._errors(name):
                file.seek(min(start, info["size"]))
            yield Answer(read, start, info["size"], found)
        finally:
            with contextlib.suppress(Exception):
                file.close()

    def put(self, name: str, path: Path) -> None:
        with path.open("rb"):
            pass

        def store() -> None:
            with self._errors(name):
                target = self._path(name)
                if self._scheme in _WHOLE_OR_NOTHING:
                    self._fs.put_file(str(path), target)
                    return
                folder, _, last = target.rpartition("/")
                aside = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}"
                self._fs.makedirs(folder, exist_ok=True)
                self._fs.put_file(str(path), aside)
                self._fs.mv(aside, target)

        self.trying(name, store)

    def list(self, prefix: str = "") -> dict[str, int]:
        def ask() -> dict[str, int]:
            root = self._opened.get()[1] + "/"
            with self._errors(""):
                self._fs.invalidate_cache()
                try:
                    found = self._fs.find(root.rstrip("/"), detail=True)
                except FileNotFoundError:
                    return {}
            names = {path.removeprefix(root): int(info["size"]) for path, info in found.items()}
            return {
                name: size
                for name, size in sorted(names.items())
                if name.startswith(prefix) and not name.rpartition("/")[2].startswith(".")
            }

        return self.trying("", ask)

    def delete(self, name: str) -> None:
        def delete() -> None:
            with self._errors(name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

        self.trying(name, delete)
