"""What tests of packing look at in a folder."""

from __future__ import annotations

from pathlib import Path

__all__ = ["files_of", "identity"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identity(path: Path) -> tuple[int, int]:
    """Inode and time: they change if a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns
