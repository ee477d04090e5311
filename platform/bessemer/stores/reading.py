"""Reading that survives dropped connections: what is missing is asked for again, from the byte that was reached."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from bessemer.stores.store import Store, TransientError

__all__ = ["Answer", "ResumingStore"]

_log = logging.getLogger(__name__)
_BLOCK = 1 << 18


class Readable(Protocol):
    """Bytes as they arrive."""

    def __call__(self, amount: int, /) -> bytes:
        """Up to `amount` bytes; none at the end. Raises TransientError when the connection drops."""
        ...


@dataclass(frozen=True)
class Answer:
    """A server's answer to the request for a part of an object."""

    read: Readable
    start: int
    """Position of its first byte: that which was asked for, or 0 where the server cannot begin elsewhere."""
    total: int | None
    """Bytes of the whole object, where the server says so."""
    version: str | None
    """What changes when the object does: an ETag, a generation, a time."""
    ends_visibly: bool = False
    """Whether the end of the answer differs from a dropped connection."""


class ResumingStore(Store):
    """A store whose objects come over connections that drop."""

    @abstractmethod
    def _open(self, name: str, start: int, stop: int | None, version: str | None) -> AbstractContextManager[Answer]:
        """Ask for bytes `start` to `stop` (None: the end) of an object.

        Args:
            name: of the object.
            start: first byte.
            stop: byte after the last; the answer may go on beyond it.
            version: as an answer before said it; the server is asked for that one where it understands this.

        Raises:
            TransientError: try again.
            MissingObjectError: there is no such object.
            StoreError: no use in trying again.
        """

    def size(self, name: str) -> int:
        def ask() -> int | None:
            with self._open(name, 0, 1, None) as answer:
                return answer.total

        size = self.trying(name, ask)
        if size is None:
            raise self.failed(name, "the server does not say how long it is", "use a server that sends Content-Length")
        return size

    def _copy(self, name: str, file: BinaryIO, start: int, stop: int | None, size: int | None) -> None:
        copy = _Copy(self, name, file, start, stop, size)
        failures, farthest = 0, start
        while True:
            try:
                with self._open(name, copy.position, stop, copy.version) as answer:
                    copy.take(answer)
                return
            except TransientError as e:
                if copy.position > farthest:
                    failures, farthest = 0, copy.position
                failures += 1
                _log.info("%s: %s at byte %d, %d in a row", self.shown(name), e, copy.position, failures)
                if failures >= self.patience.attempts:
                    raise self.gave_up(name, e, failures, f" at byte {copy.position}") from None
                if copy.version is None:
                    copy.start_over()
                self.patience.wait(failures, e.wait)


class _Copy:
    """A part of one object on its way into a file, over as many connections as it takes."""

    def __init__(self, store: Store, name: str, file: BinaryIO, start: int, stop: int | None, size: int | None) -> None:
        self._store, self._name, self._file = store, name, file
        self._start, self._stop, self._size = start, stop, size
        self._base = file.tell() if file.seekable() else None
        self._total: int | None = None
        self.position = start
        self.version: str | None = None

    def start_over(self) -> None:
        """Forget what came: without a version, nobody can say that the next bytes are of the same object."""
        if self.position > self._start:
            if self._base is None:
                raise self._store.failed(
                    self._name, "the connection dropped, and the server does not tell versions apart", "try again"
                )
            self._file.seek(self._base)
            self._file.truncate()
            self.position, self._total = self._start, None

    def take(self, answer: Answer) -> None:
        """Write what an answer brings; return when all has come."""
        self._check_same(answer)
        end = self._end()
        for block in _blocks(answer, self.position, end):
            self._file.write(block)
            self.position += len(block)
        if end is None:
            end = self._found_end(answer)
        if self._size is not None and self._stop is None and end != self._size:
            raise self._wrong_size(end)
        if self.position < end and answer.ends_visibly:
            raise self._beyond(self.position)
        if self.position < end:
            raise TransientError(f"the connection ended before byte {end}")

    def _check_same(self, answer: Answer) -> None:
        if self.version is None:
            self.version, self._total = answer.version, answer.total
        elif answer.version != self.version or (answer.total is not None and answer.total != self._total):
            raise self._store.failed(
                self._name, f"changed while it was read (at byte {self.position})", "read it again from its start"
            )
        if answer.start > self.position:
            raise self._store.failed(self._name, f"the server sent byte {answer.start} for byte {self.position}")

    def _end(self) -> int | None:
        """The byte after the last that is wanted, checked against what the object has; None if nobody knows."""
        if self._total is None:
            return self._stop
        if self._size is not None and self._total != self._size:
            raise self._wrong_size(self._total)
        if self._start > self._total or (self._stop or 0) > self._total:
            raise self._beyond(self._total)
        return self._total if self._stop is None else self._stop

    def _found_end(self, answer: Answer) -> int:
        """The byte after the last, where the server did not say it before."""
        if answer.ends_visibly:
            return self.position
        if self._size is None:  # a close after the last byte looks like one before it
            raise self._store.failed(
                self._name,
                "the server says neither how long it is nor where it ends",
                "use a server that sends Content-Length",
            )
        return max(self._size, self.position)

    def _wrong_size(self, found: int) -> Exception:
        return self._store.failed(
            self._name, f"has {found} bytes, expected {self._size}", "it was replaced or cut; store it again"
        )

    def _beyond(self, found: int) -> Exception:
        wanted = f"bytes {self._start} to {'the end' if self._stop is None else self._stop}"
        return self._store.failed(self._name, f"has {found} bytes, {wanted} were asked for", "it is not what it was")


def _blocks(answer: Answer, position: int, end: int | None) -> Iterator[bytes]:
    """What an answer holds from `position` to `end`, or to its own end."""
    at = answer.start
    while end is None or at < end:
        block = answer.read(_BLOCK if end is None else min(_BLOCK, end - at))
        if not block:
            return
        at += len(block)
        if at > position:
            yield block[max(0, len(block) - (at - position)) :]
