"""The page of a search in a real Chromium: pictures, what is pointed out, keyboard, phone, and a hostile search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tracking.browser import CHROMIUM, Tab, browser
from tests.tracking.test_report import EVIL
from tests.tracking.test_search_report import SEARCH, records

from bessemer.spec.search import SearchSpec
from bessemer.tracking.search_journal import SearchJournal
from bessemer.tracking.search_report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

RATE = "training.optimizers.generator.lr"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def page_of(directory: Path, search: dict[str, Any], found: list[dict[str, Any]]) -> str:
    (directory / "search.yaml").write_text(yaml.safe_dump(search))
    journal = SearchJournal(directory)
    for record in found:
        journal.write(record["kind"], **{key: value for key, value in record.items() if key not in ("kind", "time")})
    write_report(directory)
    return (directory / "report.html").as_uri()


def test_trials_are_followed_through_all_pictures(tab: Tab, tmp_path: Path) -> None:
    search = SearchSpec.model_validate(SEARCH)
    found = records(search, lambda point: point[RATE] * 1000, trials=12)
    tab.problems.clear()
    tab.open(page_of(tmp_path, SEARCH, found))
    count = "document.querySelectorAll('{}').length"
    assert tab.evaluate(count.format("svg.parallel path.trial")) == 12
    assert tab.evaluate(count.format("svg.cost circle.trial")) == 12
    assert tab.evaluate(count.format("tbody tr")) == 12
    names = "[...document.querySelectorAll('svg.parallel text.name title')].map((one) => one.textContent)"
    assert set(tab.evaluate(names)[:-1]) == set(SEARCH["space"])
    # The best of those that came furthest comes first, and is the line in colour.
    best = min((one for one in found if one.get("rung") == 1), key=lambda one: one["value"])["trial"]
    assert tab.evaluate("document.querySelector('tbody th').textContent") == f"t{best:04d}"
    assert tab.evaluate("document.querySelector('path.trial.first title').textContent").startswith(f"t{best:04d}: ")
    # The keyboard points at the third trial: one row, one line and one dot are its.
    tab.evaluate("document.querySelector('tbody tr:nth-child(2)').focus()")
    tab.press("Tab")
    third = tab.evaluate("document.querySelectorAll('tbody th')[2].textContent")
    picked = "[...document.querySelectorAll('.picked')].map((one) => (one.querySelector('title, th')).textContent)"
    assert [text.partition(":")[0] for text in tab.evaluate(picked)] == [third] * 3
    for width in (390, 1280):
        tab.open((tmp_path / "report.html").as_uri(), width=width, height=800, prefers_color_scheme="dark")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.problems == []
    assert [url for url in tab.requested if not url.startswith(("data:", "file:", "about:"))] == []


def test_the_final_has_the_first_and_the_last_word(tab: Tab, tmp_path: Path) -> None:
    search = {**SEARCH, "final": {"metric": "fd_efflite0", "top": 2, "samples": 5000}}
    found = records(SearchSpec.model_validate(search), lambda point: point[RATE] * 1000, trials=12)
    ends = sorted((one for one in found if one.get("rung") == 1), key=lambda one: one["value"])
    how = {"metric": "fd_efflite0", "mode": "min", "samples": 5000, "draws": 3}
    found.append({"kind": "finalists", "trials": [one["trial"] for one in ends[:2]], **how})
    for value, one in zip((31.5, 30.25), ends, strict=False):
        found.append({"kind": "final", "trial": one["trial"], "value": value, "standard_error": 0.5, "seconds": 9.0})
    tab.problems.clear()
    tab.open(page_of(tmp_path, search, found))
    winner = f"t{ends[1]['trial']:04d}"
    hero = tab.evaluate("document.querySelector('.hero').innerText")
    for words in (
        "fd_efflite0",
        "30.25",
        "± 0.5",
        winner,
        "final of 2 finalists, 3 \u00d7 5000 samples",
        "(lower is better)",
    ):
        assert words in hero, (words, hero)
    assert "within one standard error" not in hero  # 1.25 > 0.5 √2
    cells = tab.evaluate("[...document.querySelectorAll('tbody tr:first-child > *')].map((one) => one.textContent)")
    assert cells[:4] == [winner, "finished", "30.25", "± 0.5"]
    heads = tab.evaluate("[...document.querySelectorAll('thead th')].map((one) => one.textContent)")
    assert heads[:6] == ["trial", "state", "final fd_efflite0", "±", "kimg", "kid_efflite0"]
    assert tab.problems == []


def test_a_hostile_search_runs_nothing(tab: Tab, tmp_path: Path) -> None:
    space = {**SEARCH["space"], "training.lr_schedule.decay": {"choice": ["none", EVIL]}}
    del space["training.lr_schedule.final"]
    found = [
        {"kind": "trial", "trial": number, "point": {"training.lr_schedule.decay": EVIL, RATE: 1e-4, EVIL: EVIL}}
        for number in range(4)
    ]
    for number in range(4):
        result = {"kind": "result", "trial": number, "rung": 0, "value": 0.1 + number, "decision": "stop"}
        found.append({**result, "kimg": 1.0, "seconds": 9.0, "standard_error": 0.1, "values": {EVIL: 1.0}})
        found.append({"kind": "failed", "trial": number, "reason": EVIL})
    tab.problems.clear()
    tab.open(page_of(tmp_path, {**SEARCH, "space": space}, found))
    assert tab.problems == []  # a refused script would be one, too
    assert tab.evaluate("document.querySelectorAll('script').length") == 2
    assert tab.evaluate("document.querySelectorAll('img, iframe, object').length") == 0
    assert tab.evaluate("document.body.textContent").count("onerror=alert") > 5  # shown, as text
    assert tab.evaluate(
        "[...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])"
        ".every((one) => !one.name.startsWith('on'))"
    )
