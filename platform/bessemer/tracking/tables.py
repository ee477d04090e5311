"""Tables of runs: which rows, in which order, with which columns; as text, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import difflib
import functools
import io
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bessemer.errors import MachineError, RunError
from bessemer.files import write_atomically
from bessemer.spec.job import JobSpec
from bessemer.tracking.runs import flatten
from bessemer.tracking.summary import RunSummary

__all__ = ["Table", "differing", "export_table", "matching", "sorted_rows", "value_of", "with_error"]

_CONDITION = re.compile(r"\s*([\w./-]+?)\s*(>=|<=|!=|=|<|>|~)\s*(.*?)\s*")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}
_PLAIN = tuple(one.name for one in fields(RunSummary) if one.name not in ("curves", "job", "facts", "last_word"))
_NEVER_A_PARAMETER = frozenset({"name", "resources.address", "tracking.uri", "tracking.experiment"})


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def as_dicts(self) -> list[dict[str, Any]]:
        """One mapping per row, for JSON."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def value_of(row: RunSummary, name: str) -> Any:
    """A field of a run: of its row, of its job (`training.batch_size`), of its origin, or the best of a metric.

    Returns:
        Numbers as numbers; None where the run has no such value.
    """
    if name in _PLAIN:
        return getattr(row, name)
    for known in (row.job, row.facts):
        if name in known:
            return _typed(known[name])
    curve = row.curve(name)
    return None if curve is None else curve.best


def matching(rows: Iterable[RunSummary], conditions: Sequence[str]) -> list[RunSummary]:
    """Rows that meet all conditions, each `FIELD OP VALUE` with one of = != < <= > >= ~ (contains).

    Raises:
        RunError: a condition cannot be read, or no run has such a field.
    """
    rows = list(rows)
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None:
            raise RunError(
                f"--where {condition!r}: is no condition; write FIELD OP VALUE, such as state=finished, "
                "'training.batch_size>=64' or 'kid_efflite0<0.2'."
            )
        name, sign, wanted = match.groups()
        _check_known(rows, name, "--where")
        rows = [row for row in rows if _meets(value_of(row, name), sign, wanted)]
    return rows


def sorted_rows(rows: Iterable[RunSummary], by: str | None) -> list[RunSummary]:
    """Rows by a field, smallest first, or largest first for `-FIELD`; those without the value last.

    Raises:
        RunError: no run has such a field.
    """
    rows = list(rows)
    if by is None:
        return rows
    name = by.removeprefix("-")
    _check_known(rows, name, "--sort")
    having = [row for row in rows if value_of(row, name) is not None]
    having.sort(key=lambda row: _sortable(value_of(row, name)), reverse=by.startswith("-"))
    return having + [row for row in rows if value_of(row, name) is None]


def differing(rows: Sequence[RunSummary]) -> list[str]:
    """Fields of the job that are not the same in all of these runs, in the job's order.

    A field that a job lacks has its default there: the version that wrote the file did not know it yet.
    """
    names = dict.fromkeys(name for row in rows for name in row.job if name not in _NEVER_A_PARAMETER)
    return [name for name in names if len({_given(row, name) for row in rows}) > 1]


def _given(row: RunSummary, name: str) -> str | None:
    value = row.job.get(name, _defaults().get(name))
    return None if value == "{}" else value  # what is in an empty mapping has names of its own


@functools.cache
def _defaults() -> dict[str, str]:
    """Fields of a job that need not be written, as :func:`flatten` names and shows them."""
    found: dict[str, Any] = {}
    for section, described in JobSpec.model_fields.items():
        kind = described.annotation
        inner = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        optional = {name: one.get_default() for name, one in inner.items() if not one.is_required()}
        found[section] = {name: v.model_dump() if isinstance(v, BaseModel) else v for name, v in optional.items()}
    return dict(flatten(found))


def export_table(table: Table, path: Path) -> None:
    """Write a table as CSV or Parquet, by the file's ending.

    Raises:
        MachineError: another ending, no pyarrow for Parquet, or the file cannot be written.
    """
    ending = path.suffix.lower()
    if ending not in (".csv", ".parquet"):
        raise MachineError(f"--export {path}: ends with neither .csv nor .parquet; name the file with one of them.")
    content = _csv(table) if ending == ".csv" else _parquet(table)
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise MachineError(f"--export {path}: cannot be written ({error.strerror}); choose another place.") from None


def _csv(table: Table) -> bytes:
    page = io.StringIO(newline="")
    writer = csv.writer(page, lineterminator="\n")
    writer.writerow([_harmless(name) for name in table.columns])
    writer.writerows([_harmless(value) for value in row] for row in table.rows)
    return page.getvalue().encode("utf-8", errors="replace")


def _harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: names come from run directories."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _parquet(table: Table) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MachineError(
            "--export: Parquet needs pyarrow; `pip install 'bessemer[parquet]'`, or write .csv."
        ) from None
    columns = {}
    for index, name in enumerate(table.columns):
        values = [row[index] for row in table.rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = values
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), out)
    content: bytes = out.getvalue().to_pybytes()
    return content


def _check_known(rows: Sequence[RunSummary], name: str, option: str) -> None:
    known = {*_PLAIN, *(key for row in rows for key in (*row.job, *row.facts, *(c.metric for c in row.curves)))}
    if rows and name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " Take a column, a field of the job or a metric."
        raise RunError(f"{option} {name}: no run has such a field.{hint}")


def _meets(value: Any, sign: str, wanted: str) -> bool:
    if sign == "~":
        return value is not None and wanted.lower() in str(value).lower()
    target = _typed(wanted)
    if sign in ("=", "!="):
        same = value == target or str(value).lower() == wanted.lower() or (value is None and wanted in ("-", "null"))
        return same == (sign == "=")
    if isinstance(value, int | float) and isinstance(target, int | float):
        return _ORDER[sign](value, target)
    return value is not None and _ORDER[sign](str(value), wanted)


def _typed(text: str) -> Any:
    """A text of a job as what it stands for."""
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _sortable(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def with_error(value: float | None, error: float | None) -> str:
    """A value for people, with its standard error where it has one; empty for None."""
    return "" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
