"""What `bessemer search` says of a search: by which judgement somebody is best, and how sure that is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.orchestration.search_of_stubs import RATE, finished_search
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.tracking.search_journal import SearchJournal


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["search", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """Six trials are over, four of them are finalists, and nobody was judged once more."""
    path = finished_search(tmp_path / "mine", None)
    how = {"metric": "fd_pixels", "mode": "min", "samples": 1000, "draws": 2}
    SearchJournal(path).write("finalists", trials=[0, 1, 2, 3], **how)
    return path


def judge(path: Path, **finals: float | None) -> None:
    journal = SearchJournal(path)
    for name, value in finals.items():
        what: dict[str, Any] = {"value": value, "standard_error": 0.5, "seconds": 900.0}
        journal.write("final", trial=int(name[1:]), **(what if value is not None else {"reason": "not finite"}))


def test_until_the_final_is_over_the_last_rung_says_who_is_best(search: Path) -> None:
    judge(search, t0=5.0, t2=3.0)
    first = run("best", search).splitlines()[0]
    assert first == ("best: t0000 with kid_pixels 0.1 ± 0.01 at 3 kimg (the final is under way: 2 of 4 are judged)")
    assert "final: 2 of 4 finalists judged by fd_pixels, 0.5 device-hours" in run("status", search)
    run("promote", search, "--out", search / "winner.yaml")
    assert "trial t0000 (kid_pixels 0.1 at 3 kimg)" in (search / "winner.yaml").read_text()


def test_the_final_has_the_last_word(search: Path) -> None:
    judge(search, t0=5.0, t1=None, t2=3.0, t3=3.6)
    lines = run("best", search).splitlines()
    assert lines[0] == (
        "best: t0002 with fd_pixels 3 ± 0.5 (final, 2 draws of 1000 samples; kid_pixels 0.3 ± 0.01 at 3 kimg)"
    )
    assert "within one standard error of it: t0003" in run("best", search)  # 0.6 < 0.5 √2
    found = json.loads(run("best", search, "--json"))
    assert (found["trial"], found["final"], found["final_standard_error"], found["value"]) == (
        "t0002",
        3.0,
        0.5,
        pytest.approx(0.3),
    )
    said = json.loads(run("status", search, "--json"))
    assert [row["trial"] for row in said["trials"]] == ["t0002", "t0003", "t0000", "t0001", "t0004", "t0005"]
    assert said["final"] == {
        "metric": "fd_pixels", "mode": "min", "samples": 1000, "draws": 2, "finalists": 4, "judged": 4, "counts": True,
    }  # fmt: skip
    assert said["trials"][3]["reason"] == "not finite"
    table = run("status", search)
    assert re.search(r"trial +state +final fd_pixels +± +kimg +kid_pixels", table)
    assert re.search(r"t0002 +finished +3 +0.5 +3 +0.3", table)
    run("promote", search, "--out", search / "winner.yaml")
    text = (search / "winner.yaml").read_text()
    assert "trial t0002 (fd_pixels 3 in the final, kid_pixels 0.3 at 3 kimg)" in text
    rate = yaml.safe_load(text)["training"]["optimizers"]["generator"]["lr"]
    assert rate == pytest.approx(found["point"][RATE])
    report = json.loads(run("report", search, "--json"))
    assert (report["best"], report["as_good"], report["final_hours"]) == ("t0002", ["t0003"], 0.75)
    assert report["pareto"] == ["t0000"], "quality against cost is that of the rungs, where all were judged"


def test_a_final_that_judged_nobody_says_why(search: Path) -> None:
    judge(search, t0=None, t1=None, t2=None, t3=None)
    assert "t0000 with kid_pixels 0.1 ± 0.01 at 3 kimg (the final judged nobody: not finite)" in run("best", search)


@pytest.mark.parametrize("words", [("mine.yaml", "--dry-run"), ("--dry-run", "mine.yaml"), ("run", "mine.yaml")])
def test_a_file_means_run_wherever_options_stand(tmp_path: Path, words: tuple[str, ...]) -> None:
    missing = [str(tmp_path / word) if word.endswith(".yaml") else word for word in words]
    result = CliRunner().invoke(app, ["search", *missing])
    assert str(result.exception) == (
        f"{tmp_path / 'mine.yaml'}: there is no such search file; check the path, or see jobs/ for examples."
    )
