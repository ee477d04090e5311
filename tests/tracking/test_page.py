"""The report in a real Chromium: drawn, moved by mouse and keyboard, on a phone, dark, in print, under attack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tracking.browser import CHROMIUM, Tab, browser
from tests.tracking.test_report import hostile

from bessemer.evaluation.grid import Sheet
from bessemer.tracking.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

SLIDER = "document.querySelector('#grid-slider')"
PICTURES = "[...document.querySelectorAll('button.picture img')].map((image) => image.alt)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def fresh(tab: Tab) -> Tab:
    tab.problems.clear()
    tab.requested.clear()
    return tab


@pytest.fixture
def page(make_run: Any, runs_root: Path) -> str:
    """Two runs; the second ends earlier and was measured by another protocol too."""
    make_run("one").whole()
    two = make_run("two")
    two.event("started", 0, workers=2)
    two.evaluate(0, 0.6)
    two.grid(0)
    two.train(0, 20_000)
    two.event("rolled_back", 20_000)
    two.evaluate(20_000, 0.01, samples=50)
    return write_report([runs_root / "one", runs_root / "two"], runs_root / "report.html").as_uri()


def test_slider_moves_all_runs_and_the_enlarged_picture(fresh: Tab, page: str) -> None:
    fresh.open(page)
    assert fresh.evaluate(PICTURES) == ["one, 40 kimg", "two, 20 kimg", "Real images"]
    fresh.evaluate(f"{SLIDER}.focus()")
    fresh.press("ArrowLeft")
    fresh.press("ArrowLeft")
    fresh.press("ArrowLeft")
    assert fresh.evaluate(PICTURES)[:2] == ["one, 10 kimg", "two, 10 kimg"]
    assert fresh.evaluate(f"{SLIDER}.getAttribute('aria-valuetext')") == "10 kimg"
    fresh.press("Home")
    assert fresh.evaluate(PICTURES)[:2] == ["one, 0 kimg", "two, 0 kimg"]
    fresh.click("[aria-label=Later]")
    assert fresh.evaluate("document.querySelector('#grid-label').textContent") == "10 kimg"
    fresh.click("button.picture")
    zoom = "document.querySelector('#zoom')"
    assert fresh.evaluate(f"{zoom}.open")
    assert fresh.evaluate(f"{zoom}.querySelector('img').clientWidth > 400")  # of 4 pixels
    before = fresh.evaluate(f"{zoom}.querySelector('img').src")
    fresh.press("ArrowRight")
    assert fresh.evaluate(f"{zoom}.querySelector('img').alt") == "one, 20 kimg"
    assert fresh.evaluate(f"{zoom}.querySelector('img').src") != before
    fresh.press("Escape")
    assert not fresh.evaluate(f"{zoom}.open")
    assert fresh.problems == []
    assert [url for url in fresh.requested if not url.startswith(("data:", "file:"))] == []


def test_clips_move_and_sound_plays(fresh: Tab, make_run: Any, runs_root: Path) -> None:
    one, two = make_run("clips").whole(), make_run("sound").whole()
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 1, 8, 8), dtype=np.uint8)
    for name in ("kimg-000040.000", "kimg-000000.000"):
        Sheet({"clips": clips}, 1).save(one.path / "samples" / f"{name}.png")
        Sheet({"audio": np.ones((2, 4000), np.int16)}, 1, 8000).save(two.path / "samples" / f"{name}.png")
    address = write_report([one.path, two.path], runs_root / "report.html").as_uri()
    fresh.open(address)
    fresh.click("h1")  # browsers play nothing to whom has not touched the page
    audio = "document.querySelector('.player audio')"
    assert fresh.evaluate(f"{audio}.play().then(() => {audio}.duration)") == pytest.approx(2 * (0.5 + 0.25))
    moving = "document.querySelector('.player details img')"
    assert fresh.evaluate(f"{moving}.decode().then(() => [{moving}.naturalWidth, {moving}.naturalHeight])") == [16, 8]
    assert fresh.evaluate("document.querySelector('.player details').open")
    fresh.evaluate(f"{SLIDER}.focus()")
    fresh.press("ArrowLeft")
    assert fresh.evaluate("document.querySelectorAll('.player > *').length") == 0
    fresh.press("Home")
    assert fresh.evaluate("document.querySelectorAll('.player > *').length") == 2
    fresh.open(address, prefers_reduced_motion="reduce")
    assert not fresh.evaluate("document.querySelector('.player details').open")
    assert fresh.problems == []


def test_best_number_comes_first(fresh: Tab, page: str) -> None:
    fresh.open(page)
    rows = "[...document.querySelectorAll('.glance tbody tr')].map((row) => row.innerText.split('\\t').slice(0, 3))"
    assert fresh.evaluate(rows) == [["one", "0.1", "\u00b1 0.01"], ["two", "0.3", "\u00b1 0.01"]]
    assert "2 protocols, which differ in: generated images" in fresh.evaluate("document.body.innerText")


def test_curves_have_a_crosshair_by_mouse_and_keyboard_and_two_axes(fresh: Tab, page: str) -> None:
    fresh.open(page)
    readout = "[...document.querySelectorAll('.readout')].filter((one) => !one.hidden).map((one) => one.innerText)"
    fresh.evaluate("document.querySelector('figure.chart').focus()")
    fresh.press("Home")
    (shown,) = fresh.evaluate(readout)
    assert shown.splitlines()[0] == "0 kimg"
    assert "one, protocol 1 0.5 \u00b1 0.01" in shown
    fresh.press("ArrowRight")
    assert "one, protocol 1 0.4 \u00b1 0.01" in fresh.evaluate(readout)[0]
    assert "one: resumed at 10 kimg" in fresh.evaluate(readout)[0]
    visible = "[...document.querySelectorAll('.cursor')].filter((one) => !one.hidden).length"
    assert fresh.evaluate(visible) == fresh.evaluate("document.querySelectorAll('figure.chart .area').length") > 2
    fresh.click(".axis label:nth-of-type(2) input")
    assert fresh.evaluate(
        "[...new Set([...document.querySelectorAll('.xlabels b')].map((one) => one.textContent))]"
    ) == ["hours"]
    fresh.click("figure.chart .area")
    assert fresh.evaluate(readout)[0].splitlines()[0].endswith("hours")
    markers = "[...document.querySelectorAll('figure.chart')][0].querySelectorAll('.marker title')"
    assert fresh.evaluate(f"[...{markers}].map((one) => one.textContent)") == [
        "one: worker lost at 15 kimg", "one: resumed at 10 kimg", "two: rolled back at 20 kimg"
    ]  # fmt: skip
    assert fresh.problems == []


def test_everything_is_reached_by_the_keyboard(fresh: Tab, page: str) -> None:
    fresh.open(page)
    seen = set()
    for _ in range(60):
        fresh.press("Tab")
        seen.add(fresh.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"INPUT.", "BUTTON.picture", "FIGURE.chart tall", "FIGURE.chart", "SUMMARY.", "DIV.scroll"} <= seen


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_it_fits_the_window_and_follows_the_scheme(fresh: Tab, page: str, width: int, scheme: str) -> None:
    fresh.open(page, width=width, height=800, prefers_color_scheme=scheme)
    assert fresh.evaluate("document.documentElement.scrollWidth") == width
    colour = fresh.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == (scheme == "dark")
    assert fresh.problems == []


def test_it_prints(fresh: Tab, page: str) -> None:
    fresh.open(page)
    assert fresh.pdf().startswith(b"%PDF")
    assert fresh.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)")
    assert fresh.problems == []


def test_a_hostile_run_directory_runs_nothing(fresh: Tab, make_run: Any, runs_root: Path, tmp_path: Path) -> None:
    place = hostile(make_run("evil", note="<b>bold</b>"), runs_root)
    make_run("sound").whole()
    for runs in ([place], [place, runs_root / "sound"]):
        fresh.open(write_report(runs, tmp_path / "report.html").as_uri())
        assert fresh.problems == []  # a refused script would be one, too
        assert fresh.evaluate("document.querySelectorAll('script').length") == 2
        assert fresh.evaluate("document.querySelectorAll('img[src=x], b b, iframe').length") == 0
        assert fresh.evaluate("document.body.innerText").count("onerror=alert") > 5  # shown, as text
        assert fresh.evaluate(
            "[...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])"
            ".every((one) => !one.name.startsWith('on'))"
        )
        assert [url for url in fresh.requested if not url.startswith(("data:", "file:"))] == []


def test_pages_of_runs_that_have_nothing(fresh: Tab, make_run: Any) -> None:
    run = make_run()
    fresh.open(write_report(run.path).as_uri())
    shown = fresh.evaluate("document.body.innerText")
    for said in ("stopped", "No sample grid yet", "No evaluation yet", "No training metrics yet", "No events yet"):
        assert said in shown
    assert fresh.problems == []
