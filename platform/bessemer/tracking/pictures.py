"""Pictures of a run for the report: sample grids over time and the real images, inline as PNG.

A run directory may come from anywhere: a picture is taken only from inside it, only if it is a PNG of a sensible
size, and all together stay below a limit, so that the page still opens on a phone.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bessemer.tracking.files import path_inside
from bessemer.tracking.runs import Run

__all__ = ["Picture", "pictures_section"]

_MOST_GRIDS = 60
_MOST_BYTES = 8 << 20  # of one picture
_MOST_BYTES_TOGETHER = 40 << 20
_MOST_PIXELS = 8192  # on a side
_SIGNATURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


@dataclass(frozen=True)
class Picture:
    """A PNG that has been looked at."""

    label: str
    data: bytes
    width: int
    height: int

    def html(self) -> str:
        """The picture as a button that enlarges it."""
        source = base64.b64encode(self.data).decode()
        label = escape(self.label)
        return (
            f'<button type="button" class="picture" aria-label="Enlarge: {label}">'
            f'<img src="data:image/png;base64,{source}" width="{self.width}" height="{self.height}" '
            f'alt="{label}"></button>'
        )


def pictures_section(run: Run) -> str:
    """HTML of the sample grids: a slider over time beside the real images, and the first beside the last."""
    grids, notes = _grids(run)
    real = _read_png(run.path, "samples/real.png", "Real images")
    if not grids:
        real_html = f'<div class="panels">{_figure("Real images", "from the data set", real)}</div>' if real else ""
        return (
            '<section><h2>Samples</h2><p class="empty">No sample grid yet: each evaluation draws one.</p>'
            f"{_paragraphs(notes)}{real_html}</section>"
        )
    last = len(grids) - 1
    frames = "".join(
        f'<div class="frame" data-label="{escape(grid.label)}"{"" if index == last else " hidden"}>{grid.html()}</div>'
        for index, grid in enumerate(grids)
    )
    scrub = (
        '<div class="scrub"><button type="button" data-step="-1" aria-label="Earlier">&#8249;</button>'
        f'<input type="range" id="grid-slider" min="0" max="{last}" value="{last}" step="1" '
        'aria-label="Sample grid over time">'
        '<button type="button" data-step="1" aria-label="Later">&#8250;</button></div>'
    )
    moving = (
        '<figure class="shown"><figcaption><b>Samples</b>'
        f'<span id="grid-label">{escape(grids[-1].label)}</span></figcaption>{frames}{scrub if last else ""}</figure>'
    )
    beside = _figure("Real images", "from the data set", real) if real else ""
    ends = ""
    if last:
        ends = (
            "<h2>First and last</h2>"
            f'<div class="panels">{_figure("First", grids[0].label, grids[0])}'
            f"{_figure('Last', grids[-1].label, grids[-1])}</div>"
        )
    hint = "The same latents and classes in every grid, drawn from the averaged weights. Click a picture to enlarge it."
    return (
        f'<section><h2>Samples</h2><div class="panels">{moving}{beside}</div><p class="hint">{hint}</p>'
        f"{_paragraphs(notes)}{ends}</section>"
    )


def _grids(run: Run) -> tuple[list[Picture], list[str]]:
    """Grids in order of images seen, and notes on those that are not shown."""
    paths = {record["nimg"]: record.get("path") for record in run.of_kind("samples")}
    order = sorted(paths)
    grids: list[Picture] = []
    refused, budget = 0, _MOST_BYTES_TOGETHER
    chosen = _spread(order, _MOST_GRIDS)
    # The two ends first: they are what the page cannot do without.
    for nimg in sorted(chosen, key=lambda nimg: (nimg not in (order[0], order[-1]), nimg)):
        grid = _read_png(run.path, paths[nimg], f"{nimg / 1000:g} kimg")
        if grid is None:
            refused += 1
        elif len(grid.data) <= budget:
            budget -= len(grid.data)
            grids.append(grid)
    notes = []
    if refused:
        notes.append(
            f"{refused} of {len(chosen)} grids cannot be shown: missing, outside the run directory, or no sound PNG."
        )
    if len(grids) + refused < len(order):
        notes.append(f"{len(grids)} of {len(order)} grids are shown, to keep this page small.")
    return sorted(grids, key=lambda grid: float(grid.label.split()[0])), notes


def _spread(order: list[int], most: int) -> list[int]:
    """At most ``most`` of ``order``, evenly spread, with both ends."""
    if len(order) <= most:
        return order
    return [order[round(index * (len(order) - 1) / (most - 1))] for index in range(most)]


def _read_png(directory: Path, relative: object, label: str) -> Picture | None:
    path = path_inside(directory, relative)
    try:
        if path is None or path.stat().st_size > _MOST_BYTES:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_SIGNATURE) or len(data) < 33:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not (0 < width <= _MOST_PIXELS and 0 < height <= _MOST_PIXELS):
        return None
    return Picture(label, data, width, height)


def _figure(title: str, caption: str, picture: Picture) -> str:
    return (
        f'<figure class="shown"><figcaption><b>{escape(title)}</b><span>{escape(caption)}</span></figcaption>'
        f"{picture.html()}</figure>"
    )


def _paragraphs(notes: list[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
