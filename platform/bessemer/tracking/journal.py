"""The journal of a run: one JSON object per line, appended by the workers and the driver.

The journal is the record of a run; MLflow, the tables and the report are views of it. Several processes may
append at once and any of them may be killed in mid-line, so writing and reading follow three rules:

* a record is one line, written by one ``write`` to a file opened with ``O_APPEND``;
* a writer that finds the last line unfinished begins with a newline, so that only the torn record is lost;
* a reader skips what is not a record.

Records have ``kind`` (``event``, ``metrics``, ``evaluation``, ``samples``, ``sheet``), ``nimg`` (images seen) and
``time`` (Unix seconds). Numbers that are not finite are written as ``null``: NaN is not JSON.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bessemer.errors import RunError

__all__ = [
    "PROTOCOL_FIELDS",
    "Entry",
    "Journal",
    "Record",
    "finite",
    "protocol_key",
    "read_entries",
    "read_journal",
    "skim_entries",
    "standing",
]

Record = dict[str, Any]

PROTOCOL_FIELDS = (
    "estimator",
    "samples",
    "reference_samples",
    "reference_hash",
    "extractor",
    "extractor_sha256",
    "preprocessing",
    "seed",
    "truncation",
    "balance",
    "weights",
    "hardware",
)
"""Fields of an evaluation that must agree before two of its values may be compared."""

_LATEST_TIME = 2.0**36  # seconds; the year 4147: a later time is damage, and no longer a date for every library
_SUPERSEDED_KINDS = frozenset({"metrics", "evaluation", "samples", "sheet"})
_METRICS_LINE = b'{"kind":"metrics","'  # how :meth:`Journal.write` begins them


class Entry(NamedTuple):
    """A record and where the line after it begins."""

    record: Record
    end: int


class Journal:
    """Appends records to the journal at ``path``. Any number of processes may hold one.

    The file is opened for each record: records come seconds apart, and nothing has to be closed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, kind: str, nimg: int, **fields: Any) -> None:
        """Append one record and stamp it with the time.

        Args:
            kind: ``event``, ``metrics``, ``evaluation``, ``samples`` or ``sheet``.
            nimg: images seen when it happened.
            fields: what is recorded: plain values, mappings, sequences, paths, NumPy or torch scalars.

        Raises:
            RunError: the file cannot be written.
        """
        if "time" in fields:
            raise ValueError("the journal sets `time` itself")
        record = {"kind": str(kind), "nimg": int(nimg), "time": round(time.time(), 3), **fields}
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            # Training metrics come often and can be spared; the others took minutes to make.
            _append(self.path, line.encode("utf-8", errors="replace") + b"\n", durable=kind != "metrics")
        except OSError as error:
            raise RunError(
                f"journal {self.path}: cannot append a record ({error.strerror}); "
                "free disk space or make the run directory writable, then resume the run"
            ) from error


def read_entries(path: str | Path, offset: int = 0) -> list[Entry]:
    """All complete records from byte ``offset`` on, superseded ones too; a missing file holds none.

    The last line counts only when its newline is there. An ``offset`` beyond the end (the file was replaced)
    starts over.
    """
    try:
        with Path(path).open("rb") as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return []
    entries = []
    for line in data.split(b"\n")[:-1]:
        offset += len(line) + 1
        record = _parse(line)
        if record is not None:
            entries.append(Entry(record, offset))
    return entries


def skim_entries(path: str | Path, newest: int) -> list[Entry]:
    """Like :func:`read_entries`, but of the metrics only what a table needs; some thirty times as fast.

    These are the first line, the last of them before each event, and the ``newest`` that still stand: enough to know
    where the run is, how long it was up, and how fast it is now.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found: dict[int, Record] = {}
    for index, line in enumerate(lines):
        if not line.startswith(_METRICS_LINE) and (record := _parse(line)) is not None:
            found[index] = record
    events = [index for index, record in found.items() if record["kind"] == "event"]
    for way in (range(len(lines)), *(range(event - 1, -1, -1) for event in events)):
        _keep_first_sound(lines, way, found)
    limit = 2**63  # of images seen: later lines were taken back
    for index in reversed(range(len(lines))):
        if newest <= 0:
            break
        record = found.get(index) or _parse(lines[index])
        if record is None:
            continue
        if record.get("event") == "resumed":
            limit = min(limit, record["nimg"])
        elif record["kind"] == "metrics" and record["nimg"] <= limit:
            found[index] = record
            newest -= 1
    return [Entry(found[index], 0) for index in sorted(found)]


def read_journal(path: str | Path) -> list[Record]:
    """The records that describe the run as it stands, in the order they were written."""
    return standing(entry.record for entry in read_entries(path))


def standing(written: Iterable[Record]) -> list[Record]:
    """Of all records that were written, those that describe the run as it stands.

    Left out are metrics, evaluations and samples beyond the point to which a later ``resumed`` event went back, and
    evaluations that were repeated with the same protocol at the same point.
    """
    records: list[Record] = []
    for record in written:
        if record["kind"] == "event" and record.get("event") == "resumed":
            limit = record["nimg"]
            records = [old for old in records if old["kind"] not in _SUPERSEDED_KINDS or old["nimg"] <= limit]
        records.append(record)
    last = {_identity(record, index): index for index, record in enumerate(records)}
    return [records[index] for index in sorted(last.values())]


def protocol_key(record: Record) -> str:
    """Text that is equal for two evaluations if and only if their values may be compared."""
    fields = {name: record.get(name) for name in ("metric", *PROTOCOL_FIELDS)}
    return json.dumps(fields, sort_keys=True, default=str)


def finite(value: object) -> float | None:
    """``value`` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _identity(record: Record, index: int) -> object:
    """Key under which a later record replaces an earlier one."""
    if record["kind"] == "evaluation":
        return ("evaluation", record["nimg"], protocol_key(record))
    if record["kind"] == "samples":
        return ("samples", record["nimg"], str(record.get("path")))
    return index


def _append(path: Path, line: bytes, *, durable: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a short write happens only on a full disk; the next round raises
            line = line[os.write(descriptor, line) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_first_sound(lines: Sequence[bytes], way: Iterable[int], found: dict[int, Record]) -> None:
    """Find the first line of metrics along the way, unless an event is nearer."""
    for index in way:
        if index not in found and (record := _parse(lines[index])) is not None:
            found[index] = record
        if index in found and found[index]["kind"] in ("event", "metrics"):
            return


def _parse(line: bytes) -> Record | None:
    try:
        # Python's parser takes NaN and Infinity; the journal does not.
        record = json.loads(line.decode("utf-8", errors="replace"), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    nimg = record.get("nimg")
    if not isinstance(nimg, int) or isinstance(nimg, bool) or not 0 <= nimg < 2**63:
        return None
    seconds = finite(record.get("time"))
    if seconds is None or not 0 <= seconds < _LATEST_TIME:
        return None
    return record


def _plain(value: Any) -> Any:
    """``value`` in types that JSON knows."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"the journal cannot hold a {type(value).__name__}")
