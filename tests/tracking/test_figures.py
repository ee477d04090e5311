"""Curves: scales, ticks, thinning, and SVG that says what it should."""

from __future__ import annotations

import itertools
import json
import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.tracking.figures import Marker, Scale, Series, chart, format_number, thin, ticks
from bessemer.tracking.runs import Point

_NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def _svg(html: str) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", html)
    assert found
    return ElementTree.fromstring(found.group())


def test_few_points_are_kept_with_their_standard_error() -> None:
    values = thin([Point(1000, 2.0, 0.5), Point(2000, 3.0)])
    assert [(v.kimg, v.value, v.low, v.high) for v in values] == [(1.0, 2.0, 1.5, 2.5), (2.0, 3.0, 3.0, 3.0)]


def test_many_points_become_means_and_ranges() -> None:
    points = [Point(1000 * index, float(index % 10)) for index in range(5000)]
    values = thin(points, most=100)
    assert len(values) == 100
    for index, value in enumerate(values):
        part = [point.value for point in points[50 * index : 50 * index + 50]]
        assert (value.low, value.high) == (min(part), max(part))
        assert value.value == pytest.approx(sum(part) / 50)
        assert value.kimg == pytest.approx(50 * index + 24.5)


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-2, 1e9))
def test_ticks_are_few_even_and_inside(low: float, size: float) -> None:
    found = ticks(Scale(low, low + size))
    assert 2 <= len(found) <= 9
    assert all(low - 1e-5 * size <= tick <= low + size * (1 + 1e-5) for tick in found)
    steps = {round((b - a) / (found[1] - found[0]), 4) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}
    assert f"{found[1] - found[0]:.3e}"[:3].rstrip("0.") in {"1", "2", "2.5", "5"}


@given(low=st.floats(1e-12, 1e6), factor=st.floats(101, 1e12))
def test_logarithmic_ticks(low: float, factor: float) -> None:
    found = ticks(Scale(low, low * factor, log=True))
    assert 2 <= len(found) <= 14
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in found)


def test_numbers_for_people() -> None:
    assert [format_number(value) for value in (0, 0.12345, -0.5, 12.8, 123456.7)] == [
        "0",
        "0.1235",
        "\u22120.5",
        "12.8",
        "123\u202f457",
    ]
    assert format_number(1.5e-7) == "1.5e\u22127"
    assert format_number(2e9) == "2e9"
    assert [format_number(value, 0.25) for value in (0.25, 0.5)] == ["0.25", "0.50"]
    assert format_number(0.5, 0.5) == "0.5"
    assert format_number(20.0, 10.0) == "20"


def test_points_lie_where_their_values_are() -> None:
    points = [Point(0, 1.0, 0.1), Point(10_000, 0.5, 0.1), Point(20_000, 0.75, 0.1)]
    html = chart("kid", [Series("", thin(points), dots=True)], Scale(0.0, 20.0), [Marker(5.0, "resumed")], "A note.")
    svg = _svg(html)
    line = next(path for path in svg.iter("path") if path.get("class") == "line")
    places = [tuple(map(float, pair.split())) for pair in (line.get("d") or "")[1:].split("L")]
    assert [x for x, _ in places] == [0, 500, 1000]
    # Heights are linear in the value, and larger values are higher up.
    (_, first), (_, second), (_, third) = places
    assert first < third < second
    assert (third - first) == pytest.approx((second - first) / 2, abs=0.02)
    dots = [path for path in svg.iter("path") if path.get("class") == "dot"]
    assert [dot.findtext("title") for dot in dots][1] == "10 kimg: 0.5 \u00b1 0.1"
    (marker,) = (path for path in svg.iter("path") if path.get("class") == "marker")
    assert (marker.get("d"), marker.findtext("title")) == ("M250 0V1000", "resumed at 5 kimg")
    group = next(svg.iter("g"))
    assert json.loads(group.get("data-points") or "") == [
        [0, "1", "\u00b1 0.1"],
        [10, "0.5", "\u00b1 0.1"],
        [20, "0.75", "\u00b1 0.1"],
    ]
    assert "A note." in html
    assert svg.get("aria-label") == "kid against kimg: kid from 1 to 0.75"


def test_wide_ranges_get_a_logarithmic_scale_that_is_named() -> None:
    points = [Point(index, 10.0**index) for index in range(5)]
    html = chart("norms", [Series("g", thin(points))], Scale(0.0, 1.0))
    assert "Logarithmic scale." in html
    line = next(path for path in _svg(html).iter("path") if path.get("class") == "line")
    heights = [float(pair.split()[1]) for pair in (line.get("d") or "")[1:].split("L")]
    steps = [a - b for a, b in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.02)


def test_no_values_is_said() -> None:
    assert "No values yet." in chart("loss", [Series("g", [])], Scale(0.0, 1.0))


def test_texts_are_escaped() -> None:
    evil = "\"'><script>alert(1)</script>"
    html = chart(evil, [Series(evil, thin([Point(0, 1.0)]))], Scale(0.0, 1.0), [Marker(0.0, evil)], evil)
    assert "<script" not in html
    assert unescape(html).count("<script>") >= 4


@given(
    values=st.lists(
        st.tuples(st.integers(0, 2**62), _NUMBERS, st.none() | st.floats(0, 1e300)), min_size=1, max_size=8
    ),
    most=st.sampled_from([2, 240]),
)
def test_any_numbers_can_be_drawn(values: list[tuple[int, float, float | None]], most: int) -> None:
    points = sorted((Point(*value) for value in values), key=lambda point: point.nimg)
    end = points[-1].nimg / 1000 or 1.0
    html = chart("x", [Series("y", thin(points, most), dots=True)], Scale(0.0, end), [Marker(end, "end")])
    assert not re.search(r"\b(nan|inf)\b", html)
    for path in _svg(html).iter("path"):
        for number in re.findall(r"[-+.\de]+", (path.get("d") or "").replace("h.001", "")):
            assert math.isfinite(float(number))
