"""Pictures of a run for the report: sample grids over time, the real images, sheets; inline as PNG.

A run directory may come from anywhere: a picture is taken only from inside it, only if it is a PNG of a sensible
size, and all together stay below a limit, so that the page still opens on a phone.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bessemer.tracking.files import path_inside
from bessemer.tracking.runs import Run, text

__all__ = ["MOST_BYTES", "pictures_of", "read_png"]

MOST_BYTES = 9 << 20
"""Of the pictures of one page; inline they take a third more."""

_MOST_GRIDS = 60
_MOST_SHEETS = 12
_MOST_BYTES_EACH = 8 << 20
_MOST_PIXELS = 8192  # on a side
_SIGNATURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

Link = Callable[[Path, bytes], str]
"""Address of a picture: its data, or where a server has it."""


def inline(path: Path, data: bytes) -> str:  # noqa: ARG001
    """The picture itself as an address."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def pictures_of(run: Run, most_bytes: int = MOST_BYTES, link: Link = inline) -> dict[str, Any]:
    """What the page shows of a run: `grids` in order of images seen, `real`, `sheets`, and `notes` on what is missing.

    Args:
        run: the run.
        most_bytes: of all its pictures; grids are thinned out evenly to stay below.
        link: makes the addresses.
    """
    notes: list[str] = []
    budget = most_bytes

    def take(relative: object, label: str) -> dict[str, Any] | None:
        nonlocal budget
        found = read_png(run.path, relative)
        if found is None or len(found[1]) > budget:
            return None
        budget -= len(found[1])
        path, data, width, height = found
        return {"label": label, "src": link(path, data), "width": width, "height": height}

    real = take("samples/real.png", "Real images")
    sheets = []
    # Of each kind the newest: one that is drawn at every evaluation would push the others out.
    newest = {str(record.get("title") or record.get("path")): record for record in run.of_kind("sheet")}
    for record in list(newest.values())[-_MOST_SHEETS:]:
        sheet = take(record.get("path"), text(record.get("title")) or "Sheet")
        if sheet is not None:
            sheets.append(sheet | {"kimg": record["nimg"] / 1000, "note": text(record.get("note")) or ""})
    paths = {record["nimg"]: record.get("path") for record in run.of_kind("samples")}
    order = sorted(paths)
    chosen = _spread(order, _MOST_GRIDS)
    sizes = [_size(run.path, paths[nimg]) for nimg in chosen]
    average = sum(sizes) / len(sizes) if sizes else 0
    if sum(sizes) > budget:
        chosen = _spread(order, max(2, int(budget / average)))
    grids = []
    refused = 0
    # The two ends first: they are what the page cannot do without.
    for nimg in sorted(chosen, key=lambda nimg: (nimg not in (order[0], order[-1]), nimg)):
        grid = take(paths[nimg], f"{nimg / 1000:g} kimg")
        if grid is None:
            refused += 1
        else:
            grids.append(grid | {"kimg": nimg / 1000})
    if refused:
        notes.append(
            f"{refused} of {len(chosen)} grids cannot be shown: missing, too large, outside the run directory, or no "
            "sound PNG."
        )
    if len(grids) + refused < len(order):
        notes.append(f"{len(grids)} of {len(order)} grids are shown, to keep this page small.")
    return {
        "grids": sorted(grids, key=lambda grid: float(grid["kimg"])),
        "real": real,
        "sheets": sheets,
        "notes": notes,
    }


def read_png(directory: Path, relative: object) -> tuple[Path, bytes, int, int] | None:
    """Path, content, width and height of a sound PNG inside a run directory; None for anything else."""
    path = path_inside(directory, relative)
    try:
        if path is None or path.stat().st_size > _MOST_BYTES_EACH:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_SIGNATURE) or len(data) < 33:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not (0 < width <= _MOST_PIXELS and 0 < height <= _MOST_PIXELS):
        return None
    return path, data, width, height


def _size(directory: Path, relative: object) -> int:
    path = path_inside(directory, relative)
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def _spread(order: list[int], most: int) -> list[int]:
    """At most `most` of `order`, evenly spread, with both ends."""
    if len(order) <= most:
        return order
    return [order[round(index * (len(order) - 1) / (most - 1))] for index in range(most)]
