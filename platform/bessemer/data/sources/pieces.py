"""Clips and recordings cut into samples of equal length."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import IO

from bessemer.data.sources.archives import Files, FolderFiles
from bessemer.errors import DataError

__all__ = ["common_length", "open_file", "some"]


def open_file(files: Files, path: PurePosixPath) -> IO[bytes]:
    """A file of a source as a stream: of a folder the file itself, so that a piece of it costs no more than that.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(files, FolderFiles):
        try:
            return (files.folder / path).open("rb")
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
    content = files.read(path)
    assert isinstance(content, bytes)
    return io.BytesIO(content)


def common_length(name: str, unit: str, lengths: Mapping[PurePosixPath, int], wanted: int | None) -> int:
    """How long each sample is: what was asked for, or the length that all have.

    Args:
        name: of the source, for messages.
        unit: what is counted: frames, or samples.
        lengths: of each clip or recording.
        wanted: what was asked for.

    Raises:
        DataError: nothing was asked for and they differ, or all are shorter.
    """
    by_length: dict[int, list[PurePosixPath]] = {}
    for path, length in lengths.items():
        by_length.setdefault(length, []).append(path)
    if wanted is None:
        if len(by_length) == 1:
            return next(iter(by_length))
        shown = "; ".join(
            f"{length} {unit}: {len(paths)} ({some(paths, 2)})" for length, paths in sorted(by_length.items())[:5]
        )
        raise DataError(
            f"{name}: lengths differ: {shown}{'; ...' if len(by_length) > 5 else ''}. All samples have one length: cut "
            f"pieces of it, --length {max(1, min(by_length))} (or another number of {unit})"
        )
    if max(by_length) < wanted:
        raise DataError(f"{name}: --length {wanted} is more than the longest has ({max(by_length)} {unit}); lower it")
    return wanted


def some(items: list[PurePosixPath], most: int = 5) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
