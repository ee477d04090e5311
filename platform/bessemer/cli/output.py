"""How commands print: tables, JSON, sizes, files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bessemer.errors import MachineError

__all__ = ["echo_json", "finite", "human_bytes", "progress", "table", "write_text"]


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a plain table: left-aligned columns, numbers to the right, `-` for None.

    Plain text on purpose: it pipes into `grep` and `awk`, and a cell is never cut or wrapped.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [
        bool(rows) and all(value is None or _is_number(value) for value in column)
        for column in (zip(*rows, strict=True) if rows else [()] * len(headers))
    ]
    for index, line in enumerate([list(headers), *cells]):
        text = "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        typer.secho(text, bold=index == 0)


def echo_json(value: Any) -> None:
    """Print a value as indented JSON: paths and the like as text; NaN and infinity, which JSON lacks, as null."""
    typer.echo(json.dumps(finite(value), indent=2, ensure_ascii=False, default=str, allow_nan=False))


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, where that is a terminal; yields `advance(done, total)`, total None while unknown."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def human_bytes(count: float) -> str:
    """A size in bytes for people, in binary units: `human_bytes(3 << 20) == "3.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def write_text(path: Path, text: str) -> None:
    """Write a file that the person asked for.

    Raises:
        MachineError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise MachineError(f"{path}: cannot be written ({e.strerror}); choose another place with --out.") from None


def finite(value: Any) -> Any:
    """A value that JSON can say: NaN and infinity, which it lacks, become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
