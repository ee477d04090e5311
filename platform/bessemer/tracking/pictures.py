"""Pictures of a run for the report: sample grids over time, the real images, sheets; clips and sound to play.

A run directory may come from anywhere: a file is taken only from inside it, only if it begins like a PNG, GIF or WAV
file of a sensible size, and all together stay below a limit, so that the page still opens on a phone.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.tracking.files import path_inside
from bessemer.tracking.runs import Run, text

__all__ = ["MOST_BYTES", "Media", "pictures_of", "read_media"]

MOST_BYTES = 9 << 20
"""Of the pictures of one page; inline they take a third more."""

_MOST_GRIDS = 60
_MOST_SHEETS = 12
_MOST_BYTES_EACH = 8 << 20
_MOST_PIXELS = 8192  # on a side
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PLAYING = (".gif", ".wav")


class Media(NamedTuple):
    """A file of a run that a page may show."""

    path: Path
    data: bytes
    type: str
    """`image/png`, `image/gif` or `audio/wav`."""
    width: int
    height: int
    """Pixels; 0 of sound."""


Link = Callable[[Media], str]
"""Address of a picture: its data, or where a server has it."""


def inline(media: Media) -> str:
    """The file itself as an address."""
    return f"data:{media.type};base64,{base64.b64encode(media.data).decode()}"


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
        found = read_media(run.path, relative)
        if found is None or len(found.data) > budget:
            return None
        budget -= len(found.data)
        return {"label": label, "src": link(found), "width": found.width, "height": found.height, "type": found.type}

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
    grids: dict[int, dict[str, Any]] = {}
    refused = 0
    # The two ends first: they are what the page cannot do without.
    for nimg in sorted(chosen, key=lambda nimg: (nimg not in (order[0], order[-1]), nimg)):
        grid = take(paths[nimg], f"{nimg / 1000:g} kimg")
        if grid is None:
            refused += 1
        else:
            grids[nimg] = grid | {"kimg": nimg / 1000}
    if refused:
        notes.append(
            f"{refused} of {len(chosen)} grids cannot be shown: missing, too large, outside the run directory, or no "
            "sound PNG."
        )
    if len(grids) + refused < len(order):
        notes.append(f"{len(grids)} of {len(order)} grids are shown, to keep this page small.")
    unplayed = 0
    # What plays comes out of what is left, the newest first.
    for shown, relative in [(real, "samples/real.png"), *((grids[n], paths[n]) for n in sorted(grids, reverse=True))]:
        beside = _plays(run.path, relative)
        if shown is not None and beside is not None:
            shown["plays"] = take(beside, "")
            unplayed += shown["plays"] is None
    if unplayed:
        notes.append(
            f"{unplayed} sheets cannot be played here: their clips or sounds are damaged, or too large for this page."
        )
    return {"grids": [grids[nimg] for nimg in sorted(grids)], "real": real, "sheets": sheets, "notes": notes}


def _plays(directory: Path, relative: object) -> str | None:
    """The clip or sound that lies beside a picture of it."""
    beside = [str(Path(str(relative)).with_suffix(ending)) for ending in _PLAYING]
    return next((name for name in beside if path_inside(directory, name) is not None), None)


def read_media(directory: Path, relative: object) -> Media | None:
    """A sound PNG, GIF or WAV file inside a run directory; None for anything else."""
    path = path_inside(directory, relative)
    try:
        if path is None or path.stat().st_size > _MOST_BYTES_EACH:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    if path.suffix == ".wav":
        sound = data[:4] == b"RIFF" and data[8:16] == b"WAVEfmt " and len(data) > 44
        return Media(path, data, "audio/wav", 0, 0) if sound else None
    if data.startswith(_PNG) and len(data) >= 33:
        kind, width, height = "image/png", int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 26:
        kind, width, height = "image/gif", int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    else:
        return None
    if not (0 < width <= _MOST_PIXELS and 0 < height <= _MOST_PIXELS):
        return None
    return Media(path, data, kind, width, height)


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
