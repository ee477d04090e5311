"""Files of a run directory: locks, and paths that must stay inside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.errors import RunError

__all__ = ["RUN_LOCK", "hold_lock", "is_locked", "path_inside", "read_json"]

RUN_LOCK = ".lock"
"""Lock file of a run directory; whoever trains the run holds it for as long as it goes on."""

_ACQUIRE_SECONDS = 1.0


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None when there is no such file or it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def hold_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock that the kernel gives up when the process ends, however it ends.

    Args:
        path: the lock file; it is created and stays.
        wait: wait for another holder, however long it takes.

    Raises:
        RunError: another process holds it (and ``wait`` is false).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # `is_locked` takes the lock for a moment, so one refusal does not mean that somebody holds it.
        deadline = time.monotonic() + _ACQUIRE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{path}: another process holds this lock; wait until it ends, or stop it, then try again"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock at ``path``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def path_inside(directory: Path, relative: object) -> Path | None:
    """The regular file that ``relative`` names below ``directory``; None for anything else.

    Journals are data: a path in one may be absolute, climb out with ``..`` or lead out through a link.
    """
    if not isinstance(relative, str) or not relative or "\0" in relative:
        return None
    try:
        path = (directory / relative).resolve()
        inside = path.is_relative_to(directory.resolve()) and path.is_file()
    except (OSError, RuntimeError):
        return None
    return path if inside else None
