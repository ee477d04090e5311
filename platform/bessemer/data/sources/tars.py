"""Reading the member list of a tar strictly: every byte of the file belongs to a member or to its end.

tarfile and webdataset take a damaged header for the end of the archive and say nothing; what follows it is lost. Here
every header's checksum must be right, every member must lie within the file, and after the last one there is nothing
but the zeros that end a tar.

Formats: ustar and pax (POSIX.1-2001), GNU, and the tar of Unix version 7.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bessemer.errors import DataError

__all__ = ["BLOCK", "Member", "read_members"]

BLOCK = 512
_BUFFER = 1 << 16
_MOST_EXTENDED = 1 << 20
_FIX = "it is damaged or cut off: copy it again from where it was made"
_SPACES = 8 * 0x20


@dataclass(frozen=True)
class Member:
    """A member of a tar."""

    name: str
    offset: int
    """First byte of its content in the tar."""
    size: int
    """Bytes of its content."""
    kind: Literal["file", "folder", "other"]
    """`other`: links, devices, sparse files."""


def read_members(path: Path, *, name: str | None = None) -> Iterator[Member]:
    """All members of a tar that is not compressed, in order.

    Args:
        path: the tar.
        name: what messages call it.

    Raises:
        DataError: names the byte at which the tar stops making sense, what is there, and what came before it.
    """
    with path.open("rb", buffering=0) as file:
        yield from _Walk(file.fileno(), name or str(path)).members()


class _Walk:
    def __init__(self, descriptor: int, name: str):
        self._descriptor = descriptor
        self._name = name
        self._size = os.fstat(descriptor).st_size
        self._start, self._buffer = 0, b""
        self._before = "at its start"

    def members(self) -> Iterator[Member]:
        offset = 0
        extended: dict[str, str] = {}
        while True:
            header = self._header(offset)
            if header is None:
                self._check_end(offset)
                return
            start = offset
            offset += BLOCK
            kind = header[156:157]
            size = self._number(header[124:136], "length", start)
            if kind in b"xLgK":
                data = self._extension(offset, size, start)
                if kind == b"x":
                    extended |= self._pax(data, start)
                elif kind == b"L":
                    extended["path"] = _text(data.rstrip(b"\0"))
                offset += _padded(size)
                continue
            name = extended.get("path", _name(header))
            if "size" in extended:
                size = self._decimal(extended["size"], start)
            sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in extended)
            if kind == b"S" and header[482]:
                offset = self._skip_sparse_map(offset)
            extended = {}
            if kind in b"12346":  # links and devices have no content, whatever their header says
                size = 0
            if offset + size > self._size:
                raise self._fault(
                    start, f"its member {name!r} needs bytes {offset} to {offset + size}, the file has {self._size}"
                )
            if kind == b"5" or (kind == b"\0" and name.endswith("/")):
                yield Member(name, offset, size, "folder")
            else:
                yield Member(name, offset, size, "file" if kind in (b"0", b"\0", b"7") and not sparse else "other")
            self._before = f"after {name!r}"
            offset += _padded(size)

    def _header(self, offset: int) -> bytes | None:
        """The header at `offset`; None where there is a block of zeros instead."""
        block = self._read(offset, BLOCK)
        if not block:
            raise self._fault(offset, "the file ends there without the blocks of zeros that end a tar")
        if len(block) < BLOCK:
            raise self._fault(offset, f"the file ends there within a header ({len(block)} of {BLOCK} bytes)")
        if block.count(0) == BLOCK:
            return None
        checksum = self._number(block[148:156], "checksum", offset)
        found = sum(block) - sum(block[148:156]) + _SPACES
        if checksum != found:
            above = sum(byte > 127 for byte in block[:148] + block[156:])
            if checksum != found - 256 * above:  # old tars added signed bytes
                raise self._fault(offset, f"the header there is damaged: its checksum is {checksum}, should be {found}")
        return block

    def _check_end(self, offset: int) -> None:
        position = offset
        while block := self._read(position, _BUFFER):
            if block.count(0) != len(block):
                position += len(block) - len(block.lstrip(b"\0"))
                raise self._fault(
                    offset, f"there are zeros instead of a header, but data follows them at byte {position}"
                )
            position += len(block)

    def _skip_sparse_map(self, offset: int) -> int:
        while True:
            block = self._read(offset, BLOCK)
            if len(block) < BLOCK:
                raise self._fault(offset, "the file ends there within the map of a sparse file")
            offset += BLOCK
            if not block[504]:
                return offset

    def _extension(self, offset: int, size: int, header: int) -> bytes:
        if size > _MOST_EXTENDED:
            raise self._fault(header, f"there is an extended header of {size} bytes, more than any name needs")
        data = self._read(offset, size)
        if len(data) < size:
            raise self._fault(header, "the file ends there within an extended header")
        return data

    def _pax(self, data: bytes, offset: int) -> dict[str, str]:
        """Records of a pax header: length, a space, `key=value`, a line feed."""
        found = {}
        while data.rstrip(b"\0"):
            digits, _, _ = data.partition(b" ")
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            key, equals, value = data[len(digits) + 1 : length].partition(b"=")
            if length > len(data) or not equals or not value.endswith(b"\n"):
                raise self._fault(offset, "the extended header there is damaged")
            found[_text(key)] = _text(value[:-1])
            data = data[length:]
        return found

    def _decimal(self, text: str, offset: int) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise self._fault(offset, f"the length there is {text[:20]!r}, which is no number")
        return int(text)

    def _number(self, field: bytes, what: str, offset: int) -> int:
        """An octal number, or a binary one as GNU writes those that are too large."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        # int() would take signs and underscores too.
        if digits.translate(None, b"01234567"):
            raise self._fault(offset, f"the header there is damaged: its {what} is {field!r}, which is no number")
        return int(digits or b"0", 8)

    def _read(self, offset: int, count: int) -> bytes:
        inside = offset - self._start
        if not 0 <= inside <= len(self._buffer) - count:
            self._start, inside = offset, 0
            self._buffer = os.pread(self._descriptor, max(count, _BUFFER), offset)
        return self._buffer[inside : inside + count]

    def _fault(self, offset: int, what: str) -> DataError:
        return DataError(f"{self._name}: byte {offset}, {self._before}: {what}; {_FIX}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    # In GNU's own format other things are where ustar has the prefix.
    return _text(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)
