"""What a store is: named objects of bytes that are read in ranges, put whole, listed and deleted."""

from __future__ import annotations

import io
import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar
from urllib.parse import urlsplit

from bessemer.errors import StoreError

__all__ = ["MissingObjectError", "Patience", "PerProcess", "Store", "TransientError", "without_secrets"]

T = TypeVar("T")


class MissingObjectError(StoreError):
    """The store answers, and has no object of this name."""


class TransientError(Exception):
    """What may go away by itself: a connection that dropped, a server that is busy. Never leaves this room.

    Args:
        reason: what happened, in one line.
        wait: seconds that the server asked to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How long a store is tried. An attempt that brought new bytes starts the count again."""

    attempts: int = 6
    """Attempts in a row that may fail."""
    pause: float = 0.25
    """Seconds before the second attempt; each later pause is twice as long, less a random share up to a half."""
    longest_pause: float = 10.0
    """Seconds; also the most that a server can ask for."""
    timeout: float = 30.0
    """Seconds without an answer, or without a byte of it, after which a connection counts as dropped."""

    def wait(self, failures: int, asked: float = 0.0) -> None:
        """Sleep after the `failures`-th failure in a row."""
        # At random: workers that lost the same server must not all come back at the same moment.
        pause = self.pause * 2 ** (failures - 1) * random.uniform(0.5, 1)
        time.sleep(min(max(pause, asked), self.longest_pause))


class PerProcess(Generic[T]):
    """A thing made at first use in each process: connections must not cross a fork, and cannot be pickled."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def get(self) -> T:
        """The thing of this process; all its threads get the same."""
        found = self._made.get(os.getpid())
        return found if found is not None else self._made.setdefault(os.getpid(), self._make())

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_made": {}}


class Store(ABC):
    """Objects by name below one URL. Threads may share a store, and it may be pickled.

    Names are relative paths with forward slashes, such as ``train/000000.tar``. Whatever goes wrong is a StoreError
    that names store and object, what happened, and what to do; a dropped connection or a busy server is tried again
    first, as `patience` says.

    Args:
        url: as a person wrote it.
        patience: how long to try.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url, patience
        self.name = without_secrets(url)
        """The URL for messages: without password and query, which may be a signature."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object.

        Raises:
            MissingObjectError: there is none.
        """

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `start` to `start + length` of an object, or to its end: exactly those, or an error.

        Raises:
            MissingObjectError: there is no such object.
            StoreError: the object ends before that, changed meanwhile, or cannot be read.
        """
        if start < 0 or (length is not None and length < 0):
            raise ValueError(f"start {start}, length {length}: must not be negative")
        if length == 0:
            return b""
        buffer = io.BytesIO()
        self._copy(name, buffer, start, None if length is None else start + length, None)
        return buffer.getvalue()

    def download(self, name: str, file: BinaryIO, *, size: int | None = None) -> None:
        """Append a whole object to an open file, without ever holding it in memory.

        Args:
            name: of the object.
            file: open for writing; after an error it may hold a part of the object.
            size: bytes that the object must have.

        Raises:
            MissingObjectError: there is no such object.
            StoreError: it has another size, changed meanwhile, or cannot be read.
        """
        self._copy(name, file, 0, None, size)

    @abstractmethod
    def _copy(self, name: str, file: BinaryIO, start: int, stop: int | None, size: int | None) -> None:
        """Write bytes `start` to `stop` (None: the end) of an object that must have `size` bytes to `file`."""

    @abstractmethod
    def put(self, name: str, path: Path) -> None:
        """Store the file at `path` under a name, in place of what was there. Others see all of it or nothing.

        Raises:
            StoreError: it cannot be stored.
            OSError: the file cannot be read.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, int]:
        """Names that begin with `prefix`, sorted, and the bytes of each. Of a store that is not there: nothing."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object; nothing happens if there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        try:
            self.size(name)
        except MissingObjectError:
            return False
        return True

    def shown(self, name: str) -> str:
        """An object for messages."""
        return f"{self.name.rstrip('/')}/{name}"

    def checked(self, name: str) -> str:
        """The name, if it names something in this store: names come from manifests, and may be anything."""
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise StoreError(f"{self.shown(name)}: {name!r} is no relative path below {self.name}; correct the name.")
        return name

    def missing(self, name: str) -> MissingObjectError:
        """The error for an object that is not there."""
        return MissingObjectError(f"{self.shown(name)}: there is no such object; check the address.")

    def failed(self, name: str, what: str, fix: str = "") -> StoreError:
        """The error for what happened to an object, or with an empty name to the store."""
        return StoreError(f"{self.shown(name) if name else self.name}: {what}{f'; {fix}' if fix else ''}.")

    def trying(self, name: str, action: Callable[[], T]) -> T:
        """The result of `action`, tried again while it raises TransientError and patience lasts."""
        failures = 0
        while True:
            try:
                return action()
            except TransientError as e:
                failures += 1
                if failures >= self.patience.attempts:
                    raise self.gave_up(name, e, failures) from None
                self.patience.wait(failures, e.wait)

    def gave_up(self, name: str, why: TransientError, attempts: int, at: str = "") -> StoreError:
        """The error after the last attempt."""
        tried = f"gave up{at} after {attempts} attempts in a row"
        return self.failed(name, f"{tried}: {why}", "check that the store is up and can be reached from here")


def without_secrets(url: str) -> str:
    """A URL without password and query."""
    parts = urlsplit(url) if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) else None
    if parts is None or not (parts.query or parts.fragment or "@" in parts.netloc):
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
