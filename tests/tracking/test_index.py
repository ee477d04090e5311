"""Rows of all runs: skimmed journals give the same as whole ones, and kept rows never outlive their journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bessemer.tracking import index, journal, runs
from bessemer.tracking.files import RUN_LOCK, hold_lock
from bessemer.tracking.index import RunIndex, list_runs
from bessemer.tracking.journal import read_entries, skim_entries, standing
from bessemer.tracking.runs import load_run, sessions_of
from bessemer.tracking.summary import summarise

_LINE = st.one_of(
    st.tuples(st.just("metrics"), st.integers(0, 50), st.integers(0, 9)),
    st.tuples(st.sampled_from(["started", "resumed", "checkpoint", "warning", "finished"]), st.integers(0, 50)),
    st.tuples(st.just("evaluation"), st.integers(0, 50), st.floats(0, 1)),
    st.sampled_from(["torn", '{"kind":"metrics","nimg":-1,"time":1}', '{"kind":"metrics","nimg":'])
    .map(lambda text: ("text", text)),
)  # fmt: skip


def _write(path: Path, lines: list[tuple[Any, ...]]) -> None:
    text = ""
    for second, (kind, *values) in enumerate(lines):
        stamp = {"time": 1000.0 + second}
        if kind == "text":
            text += f"{values[0]}\n"
            continue
        if kind == "metrics":
            fields: Any = {"kind": kind, "nimg": values[0], **stamp, "values": {"throughput/img_per_s": values[1]}}
        elif kind == "evaluation":
            fields = {"kind": kind, "nimg": values[0], **stamp, "metric": "fid", "value": values[1]}
        else:
            fields = {"kind": "event", "nimg": values[0], **stamp, "event": kind, "workers": 2}
        text += json.dumps(fields, separators=(",", ":")) + "\n"
    path.write_text(text)


@given(lines=st.lists(_LINE, max_size=40))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_skimmed_journal_gives_the_row_of_the_whole_one(make_run: Any, runs_root: Path, lines: Any) -> None:
    path = runs_root / "run"
    run = make_run("run") if not path.exists() else None
    del run
    _write(path / "journal.jsonl", lines)
    whole, skimmed = load_run(path), load_run(path, newest=20)
    assert summarise(skimmed) == summarise(whole)
    assert [r for r in skimmed.records if r["kind"] != "metrics"] == [
        r for r in whole.records if r["kind"] != "metrics"
    ]


def test_skimming_parses_few_lines(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    _write(run.journal.path, [("started", 0), *(("metrics", n, 1) for n in range(1, 3000)), ("checkpoint", 3000)])
    parsed: list[bytes] = []
    parse = journal._parse
    monkeypatch.setattr(journal, "_parse", lambda line: (parsed.append(line), parse(line))[1])
    entries = skim_entries(run.journal.path, 20)
    assert len(parsed) < 30
    assert [e.record["nimg"] for e in entries] == [0, *range(2980, 3000), 3000]


def test_device_hours_count_what_was_lost_and_not_the_night_between(make_run: Any) -> None:
    run = make_run()
    hour = 3600
    moments = [
        ("started", 0, 0, 2),
        ("metrics", 10, hour, None),
        ("resumed", 5, 1.5 * hour, 2),  # a worker was lost, and with it what came after 5
        ("metrics", 20, 2.5 * hour, None),
        ("started", 0, 20 * hour, 4),  # the next day, on four
        ("resumed", 20, 20.5 * hour, 4),
        ("metrics", 30, 21 * hour, None),
    ]
    with run.journal.path.open("w") as file:
        for name, nimg, second, workers in moments:
            what = {"kind": "metrics", "values": {}} if name == "metrics" else {"kind": "event", "event": name}
            file.write(json.dumps({**what, "nimg": nimg, "time": second, "workers": workers}) + "\n")
    loaded = load_run(run.path)
    assert [(s.begin / hour, s.end / hour, s.workers) for s in loaded.sessions] == [
        (0, 1, 2), (1.5, 2.5, 2), (20, 21, 4)
    ]  # fmt: skip
    assert loaded.device_hours == pytest.approx(1 * 2 + 1 * 2 + 1 * 4)
    assert load_run(run.path, newest=1).device_hours == loaded.device_hours
    assert sessions_of([]) == []
    assert standing(e.record for e in read_entries(run.journal.path)) == loaded.records


def test_rows_are_kept_until_a_file_changes(
    make_run: Any, runs_root: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = make_run("one").whole(), make_run("two").whole()
    first = list_runs(runs_root)
    looked: list[str] = []
    read = index.read_summary
    monkeypatch.setattr(index, "read_summary", lambda path: (looked.append(path.name), read(path))[1])
    assert list_runs(runs_root) == first
    assert looked == []
    run.evaluate(40_000, 0.01)
    assert {row.name: row.best for row in list_runs(runs_root)} == {"one": 0.01, "two": pytest.approx(0.1)}
    job = other.path / "job.yaml"
    job.write_text(job.read_text().replace("total_kimg: 40.0", "total_kimg: 80.0"))
    assert {row.name: row.total_kimg for row in list_runs(runs_root)} == {"one": 40.0, "two": 80.0}
    assert looked == ["one", "two"]
    other.path.rename(runs_root / "renamed")
    assert {row.name for row in list_runs(runs_root)} == {"one", "renamed"}
    (kept,) = (own_cache / "runs").glob("*.json")
    assert list(json.loads(kept.read_text())["rows"]) == ["one", "renamed"]


def test_a_journal_of_the_same_size_is_read_again(make_run: Any, runs_root: Path) -> None:
    run = make_run("one")
    run.evaluate(1000, 0.25)
    assert list_runs(runs_root)[0].best == 0.25
    text = run.journal.path.read_text().replace("0.25", "0.75")
    aside = run.path / "journal.new"
    aside.write_text(text)
    aside.replace(run.journal.path)
    assert list_runs(runs_root)[0].best == 0.75


@pytest.mark.parametrize("damage", ["", "[]", '{"format": 1}', None])
def test_damaged_or_foreign_rows_are_made_again(
    make_run: Any, runs_root: Path, own_cache: Path, damage: str | None
) -> None:
    make_run("one").whole()
    first = list_runs(runs_root)
    (kept,) = (own_cache / "runs").glob("*.json")
    if damage is None:
        content = json.loads(kept.read_text())
        content["rows"]["one"][1]["curves"] = [{"metric": "fid"}]
        damage = json.dumps(content)
    kept.write_text(damage)
    assert list_runs(runs_root) == first


def test_the_state_of_a_kept_row_is_that_of_now(make_run: Any, runs_root: Path) -> None:
    run = make_run("one")
    run.event("started", 0)
    with hold_lock(run.path / RUN_LOCK):
        assert list_runs(runs_root)[0].state == "running"
    assert RunIndex(runs_root).kept_rows()[0].state == "stopped"
    assert list_runs(runs_root)[0].state == "stopped"


def test_a_cache_that_cannot_be_written_costs_time_only(
    make_run: Any, runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("one").whole()
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "file"))
    assert [row.name for row in list_runs(runs_root)] == ["one"]
    assert runs.state_of(runs_root / "one", "finished", None) == "finished"
