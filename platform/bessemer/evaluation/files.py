"""Where evaluation keeps files between runs, and how to write them so that they are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["cache_dir", "write_atomically"]


def cache_dir() -> Path:
    """Directory for what can be made again: ``BESSEMER_CACHE``, or ``~/.cache/bessemer``."""
    said = os.environ.get("BESSEMER_CACHE")
    return Path(said).expanduser() if said else Path.home() / ".cache" / "bessemer"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there; makes the directory.

    Raises:
        OSError: the directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("xb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
