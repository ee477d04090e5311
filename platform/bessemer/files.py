"""Files that are whole or not there: write aside, fsync, rename; and hashes that prove it later."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["cache_dir", "file_sha256", "hidden_name", "sync", "write_atomically", "write_synced"]


def cache_dir() -> Path:
    """Directory for what can be made again: ``BESSEMER_CACHE``, or ``~/.cache/bessemer``."""
    said = os.environ.get("BESSEMER_CACHE")
    return Path(said).expanduser() if said else Path.home() / ".cache" / "bessemer"


def file_sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hidden_name(final: Path) -> Path:
    """A fresh name beside `final` that no reader looks at."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and force it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, force it to the disk, and move it there.

    Raises:
        OSError: the directory is not there, or cannot be written.
    """
    aside = hidden_name(path)
    try:
        with aside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
