"""Curves for the report, drawn as SVG by hand: crisp at any width, themed by CSS, no library in the page.

The plot area is an SVG that stretches with the page (lines keep their width through ``non-scaling-stroke``); tick
labels are HTML placed by percentages, so that text keeps its size on a phone. The values travel in ``data-points``
attributes, from which the page's script makes the readout under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bessemer.tracking.runs import Point

__all__ = ["Marker", "Scale", "Series", "Value", "chart", "format_number", "thin", "ticks"]

_SIZE = 1000  # the side of the SVG's own coordinates
_LOG_RATIO = 100.0
_COLOURS = 6
_SMALLEST, _LARGEST = 1e-290, 1e306  # beyond these, axes drown in the limits of floating point


@dataclass(frozen=True)
class Value:
    """One drawn value and the band around it."""

    kimg: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    values: Sequence[Value]
    dots: bool = False
    """Mark each value: for values that were measured one by one."""


@dataclass(frozen=True)
class Marker:
    """Something that happened at a point of the run."""

    kimg: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Maps values to fractions of an axis."""

    low: float
    high: float
    log: bool = False

    def fraction(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def thin(points: Sequence[Point], most: int = 240) -> list[Value]:
    """At most ``most`` values: means of neighbours, with their lowest and highest as the band.

    With few enough points each is kept, and its band is plus and minus one standard error where it has one.
    """
    if len(points) <= most:
        spreads = [_limit(point.standard_error or 0.0) for point in points]
        return [
            Value(point.nimg / 1000, y, y - spread, y + spread)
            for point, y, spread in zip(points, (_limit(point.value) for point in points), spreads, strict=True)
        ]
    values = []
    for index in range(most):
        part = points[index * len(points) // most : (index + 1) * len(points) // most]
        ys = [_limit(point.value) for point in part]
        # Means are taken of shares: the sum of huge values would overflow.
        values.append(
            Value(sum(p.nimg / len(part) for p in part) / 1000, sum(y / len(ys) for y in ys), min(ys), max(ys))
        )
    return values


def _limit(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)


def ticks(scale: Scale, count: int = 5) -> list[float]:
    """About ``count`` round numbers inside the scale; powers of ten on a logarithmic one."""
    if scale.log:
        first, last = math.ceil(math.log10(scale.low) - 1e-9), math.floor(math.log10(scale.high) + 1e-9)
        step = max(1, round((last - first) / count))
        powers = [10.0**power for power in range(first, last + 1, step)]
        if last - first > 1:
            return powers
        fine = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [tick for tick in fine if scale.low <= tick <= scale.high]
    rough = (scale.high - scale.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.75)
    begin, end = math.ceil(scale.low / size - 1e-6), math.floor(scale.high / size + 1e-6)
    return [index * size for index in range(begin, end + 1)]


def format_number(value: float, step: float | None = None) -> str:
    """A number for people: four significant digits, or as many decimals as a tick's ``step`` needs."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "\u2212")
    if step is not None:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        decimals += f"{step:e}"[2] == "5" and f"{step:e}"[0] == "2"  # steps of 2.5 need one more
        shown = f"{value:,.{decimals}f}"
    elif abs(value) >= 1000:
        shown = f"{value:,.0f}"
    else:
        shown = f"{value:.4g}"
    return shown.replace(",", "\u202f").replace("-", "\u2212")


def chart(title: str, series: Sequence[Series], x: Scale, markers: Sequence[Marker] = (), note: str = "") -> str:
    """HTML of one chart against kimg. All texts are escaped here.

    Args:
        title: what is drawn.
        series: the lines; those without values are listed in the legend only.
        x: range in kimg; share it between charts so that they line up.
        markers: events, drawn as vertical lines.
        note: a sentence below the chart.
    """
    drawn = [one for one in series if one.values]
    if not drawn:
        return (
            f'<figure class="chart"><figcaption><h3>{escape(title)}</h3></figcaption>'
            f'<p class="empty">No values yet. {escape(note)}</p></figure>'
        )
    y = _value_scale(drawn)
    legend = "".join(
        f'<li class="c{index % _COLOURS}">{escape(one.label)}</li>' for index, one in enumerate(series) if one.label
    )
    body = "".join(_draw(one, f"c{index % _COLOURS}", x, y) for index, one in enumerate(series) if one.values)
    y_ticks, x_ticks = ticks(y), ticks(x)
    y_step = None if y.log or len(y_ticks) < 2 else y_ticks[1] - y_ticks[0]
    x_step = x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else None
    grid = "".join(f'<path class="grid" d="M0 {_px(1 - y.fraction(tick))}H{_SIZE}"/>' for tick in y_ticks)
    y_labels = "".join(
        f'<span style="bottom:{_percent(y.fraction(tick))}">{format_number(tick, y_step)}</span>' for tick in y_ticks
    )
    x_labels = "".join(
        f'<span style="left:{_percent(x.fraction(tick))}">{format_number(tick, x_step)}</span>' for tick in x_ticks
    )
    notes = " ".join(part for part in ("Logarithmic scale." if y.log else "", note) if part)
    return (
        f'<figure class="chart" tabindex="0" data-low="{x.low!r}" data-high="{x.high!r}">'
        f'<figcaption><h3>{escape(title)}</h3><ul class="legend">{legend}</ul></figcaption>'
        f'<div class="plot"><div class="ylabels" aria-hidden="true">{y_labels}</div><div class="area">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(_describe(title, drawn))}">'
        f"{grid}{''.join(_draw_marker(marker, x) for marker in markers)}{body}</svg>"
        '<i class="cursor" hidden></i><output class="readout" hidden></output></div>'
        f'<div class="xlabels" aria-hidden="true">{x_labels}<b>kimg</b></div></div>'
        + (f'<p class="note">{escape(notes)}</p>' if notes else "")
        + "</figure>"
    )


def _value_scale(series: Sequence[Series]) -> Scale:
    values = [value for one in series for value in one.values]
    low, high = min(value.low for value in values), max(value.high for value in values)
    size = max(abs(low), abs(high))
    if size < _SMALLEST:
        return Scale(-1.0, 1.0)
    if high - low <= 1e-9 * size:  # a constant, but for rounding
        return Scale(low - 0.1 * size, high + 0.1 * size)
    if low > _SMALLEST and high / low > _LOG_RATIO:
        return Scale(low / 1.2, high * 1.2, log=True)
    if 0 <= low < 0.4 * high:
        return Scale(0.0, high * 1.06)
    margin = 0.06 * (high - low)
    return Scale(low - margin, high + margin)


def _draw(series: Series, colour: str, x: Scale, y: Scale) -> str:
    def place(kimg: float, value: float) -> str:
        return f"{_px(x.fraction(kimg))} {_px(1 - y.fraction(value))}"

    values = series.values
    line = "L".join(place(v.kimg, v.value) for v in values)
    # A line of no length with round ends is a dot that stays round while the area stretches.
    parts = [f'<path class="line" d="M{line}"/>' if len(values) > 1 else ""]
    if any(v.high > v.low for v in values):
        upper = [place(v.kimg, v.high) for v in values]
        lower = [place(v.kimg, v.low) for v in reversed(values)]
        parts.insert(0, f'<path class="band" d="M{"L".join(upper + lower)}Z"/>')
    if series.dots or len(values) == 1:
        parts += [
            f'<path class="dot" d="M{place(v.kimg, v.value)}h.001"><title>{escape(_readout(v))}</title></path>'
            for v in values
        ]
    data = [[round(v.kimg, 6), format_number(v.value), _spread(v)] for v in values]
    attributes = f'data-label="{escape(series.label)}" data-points="{escape(json.dumps(data, separators=(",", ":")))}"'
    return f'<g class="series {colour}" {attributes}>{"".join(parts)}</g>'


def _draw_marker(marker: Marker, x: Scale) -> str:
    return (
        f'<path class="marker" d="M{_px(x.fraction(marker.kimg))} 0V{_SIZE}">'
        f"<title>{escape(marker.label)} at {format_number(marker.kimg)} kimg</title></path>"
    )


def _spread(value: Value) -> str:
    """The band in words: plus-minus where it is symmetric, a range where it comes from thinning."""
    if value.high <= value.low:
        return ""
    up, down = value.high - value.value, value.value - value.low
    if math.isclose(up, down, rel_tol=1e-6):
        return f"\u00b1 {format_number(up)}"
    return f"({format_number(value.low)} to {format_number(value.high)})"


def _readout(value: Value) -> str:
    return f"{format_number(value.kimg)} kimg: {format_number(value.value)} {_spread(value)}".rstrip()


def _describe(title: str, series: Sequence[Series]) -> str:
    ends = [
        f"{one.label or title} from {format_number(one.values[0].value)} to {format_number(one.values[-1].value)}"
        for one in series
    ]
    return f"{title} against kimg: {'; '.join(ends)}"


def _px(fraction: float) -> str:
    return f"{min(max(fraction, -1.0), 2.0) * _SIZE:.2f}".rstrip("0").rstrip(".")


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.3f}%"
