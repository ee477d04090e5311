"""Where a data set is made: a directory beside its destination, which it becomes by a rename when it is whole."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bessemer.data.manifest import MANIFEST
from bessemer.errors import DataError
from bessemer.files import sync

__all__ = ["PLAN", "check_destination", "open_aside", "publish"]

PLAN = "plan"
"""Name of the note that says of which source and by which rules the shards beside it are."""


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuse to replace what is no data set, or one that nobody asked to replace.

    Raises:
        DataError: says what is there.
    """
    _restore(destination)
    if not destination.exists() and not destination.is_symlink():
        return
    if not destination.is_dir() or destination.is_symlink():
        raise DataError(f"destination {destination} is a file or a link; choose another place")
    if not any(destination.iterdir()):
        return
    if not (destination / MANIFEST).exists():
        raise DataError(
            f"destination {destination} is a folder with other things in it, which are never deleted; choose a new "
            f"place"
        )
    if not overwrite:
        raise DataError(f"destination {destination} exists; choose another place, or replace it with --overwrite")


@contextmanager
def open_aside(destination: Path) -> Iterator[Path]:
    """A locked directory beside the destination, with what an interrupted packer left in it.

    It stays when packing is interrupted or the disk is full, so that the same command goes on there. It goes when the
    source turns out to be unusable.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside, lock = _open_locked(destination)
    except OSError as error:
        raise DataError(
            f"destination {destination} cannot be made: {error.strerror}; choose a place where you may write"
        ) from None
    try:
        yield aside
    except DataError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"destination {destination}: {error.strerror}; free some space and give the same command again: it goes on "
            f"where it stopped (what is done lies in {aside})"
        ) from None
    finally:
        os.close(lock)


def publish(aside: Path, destination: Path, files: Collection[str], overwrite: bool) -> None:
    """Let the directory become the destination; drop all in it but `files`.

    The plan goes last: whoever comes after a kill in between finds a whole data set of a known plan, and publishes it.

    Raises:
        DataError: something else has appeared at the destination.
    """
    for path in aside.iterdir():
        if path.name not in files and path.name != PLAN:
            path.unlink()
    sync(aside)
    check_destination(destination, overwrite)  # it may have appeared meanwhile
    old: Path | None = None
    if destination.exists() and any(destination.iterdir()):
        old = destination.parent / f".{destination.name}.replaced-{uuid.uuid4().hex[:8]}"
        destination.rename(old)
    (aside / PLAN).unlink()
    aside.rename(destination)
    sync(destination.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _open_locked(destination: Path) -> tuple[Path, int]:
    aside = destination.parent / f".{destination.name}.partial"
    while True:
        aside.mkdir(exist_ok=True)
        try:
            lock = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # another packer has just published or removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise DataError(
                f"destination {destination} is being packed by another process; wait for it, or choose another place"
            ) from None
        except OSError:  # a file system without locks
            pass
        if aside.exists() and aside.stat().st_ino == os.fstat(lock).st_ino:
            return aside, lock
        os.close(lock)


def _restore(destination: Path) -> None:
    """Put back what a packer had moved away when it was killed between its two renames, or finish its clearing up."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.replaced-????????"):
        if destination.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(destination)
