"""The journal: what is written is read, whatever happens to the writers."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.errors import RunError
from bessemer.tracking.journal import Journal, finite, protocol_key, read_entries, read_journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def test_records_come_back_with_time(journal: Journal) -> None:
    journal.write("event", 0, event="started", workers=2)
    journal.write("metrics", 12_800, values={"loss/generator": np.float32(0.5), "steps": np.int64(3)})
    started, metrics = read_journal(journal.path)
    assert started == {"kind": "event", "nimg": 0, "time": started["time"], "event": "started", "workers": 2}
    assert metrics["values"] == {"loss/generator": 0.5, "steps": 3}
    assert 1.7e9 < started["time"] <= metrics["time"]


def test_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == []


def test_numbers_that_are_not_finite_become_null(journal: Journal) -> None:
    journal.write("metrics", 1, values={"a": float("nan"), "b": np.float32("inf"), "c": [-float("inf"), 1.0]})
    assert read_journal(journal.path)[0]["values"] == {"a": None, "b": None, "c": [None, 1.0]}
    json.loads(journal.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_paths_and_newlines_stay_on_one_line(journal: Journal) -> None:
    journal.write("event", 0, event="failed", error="line\nline\u2028\r\n", file=Path("a/b"))
    assert journal.path.read_bytes().count(b"\n") == 1
    assert read_journal(journal.path)[0]["error"] == "line\nline\u2028\r\n"
    assert read_journal(journal.path)[0]["file"] == "a/b"


def test_unknown_types_and_reserved_names_are_refused(journal: Journal) -> None:
    with pytest.raises(TypeError, match="cannot hold a object"):
        journal.write("event", 0, event=object())
    with pytest.raises(ValueError, match="time"):
        journal.write("event", 0, time=3)
    assert not journal.path.exists()


def test_unwritable_journal_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"journal .*none/journal.jsonl.*resume the run"):
        Journal(tmp_path / "none" / "journal.jsonl").write("event", 0)


@pytest.mark.parametrize("torn", [b'{"kind":"metrics","nimg":3,"ti', b"{", b'"', b"\xff\xfe", b'{"kind":"event"}'])
def test_torn_last_line_loses_only_itself(journal: Journal, torn: bytes) -> None:
    journal.write("metrics", 1, values={})
    with journal.path.open("ab") as file:
        file.write(torn)
    assert [r["nimg"] for r in read_journal(journal.path)] == [1]
    journal.write("metrics", 2, values={})  # the next writer, after a restart
    journal.write("metrics", 3, values={})
    assert [r["nimg"] for r in read_journal(journal.path)] == [1, 2, 3]


def test_every_cut_of_a_journal_gives_a_prefix(journal: Journal) -> None:
    for nimg in range(4):
        journal.write("metrics", nimg, values={"loss": nimg / 3})
    whole, records = journal.path.read_bytes(), read_journal(journal.path)
    for length in range(len(whole)):
        journal.path.write_bytes(whole[:length])
        assert read_journal(journal.path) == records[: whole[:length].count(b"\n")]


def test_resume_supersedes_what_lay_beyond_it(journal: Journal) -> None:
    for nimg in (1000, 2000, 3000):
        journal.write("metrics", nimg, values={"old": 1.0})
        journal.write("evaluation", nimg, metric="kid_efflite0", value=1.0)
        journal.write("samples", nimg, path=f"samples/{nimg}.png")
    journal.write("event", 3000, event="worker_lost")
    journal.write("event", 2000, event="resumed")
    journal.write("metrics", 3000, values={"new": 1.0})
    records = read_journal(journal.path)
    kept = [r["nimg"] for r in records if r["kind"] != "event"]
    assert kept == [1000] * 3 + [2000] * 3 + [3000]
    assert records[-1]["values"] == {"new": 1.0}
    assert [r["event"] for r in records if r["kind"] == "event"] == ["worker_lost", "resumed"]
    assert len(read_entries(journal.path)) == 12  # nothing is deleted


def test_repeated_evaluation_replaces_the_first_unless_its_protocol_differs(journal: Journal) -> None:
    for value, seed in ((1.0, 0), (2.0, 1), (3.0, 0)):
        journal.write("evaluation", 1000, metric="fid", value=value, samples=500, seed=seed)
    assert [r["value"] for r in read_journal(journal.path)] == [2.0, 3.0]
    first, second = read_journal(journal.path)
    assert protocol_key(first) != protocol_key(second)
    assert protocol_key(first) == protocol_key(first | {"value": 9.0, "seconds": 3, "nimg": 7})


def test_entries_continue_where_the_last_reading_ended(journal: Journal) -> None:
    journal.write("metrics", 1, values={})
    with journal.path.open("ab") as file:
        file.write(b"damage\n")
    (first,) = read_entries(journal.path)
    assert read_entries(journal.path, first.end) == []
    journal.write("metrics", 2, values={})
    (second,) = read_entries(journal.path, first.end)
    assert second.record["nimg"] == 2
    assert second.end == journal.path.stat().st_size
    assert len(read_entries(journal.path, 10**9)) == 2  # the file was replaced: start over


def _append_many(path: str, writer: int, count: int) -> None:
    journal = Journal(path)
    for index in range(count):
        journal.write("metrics", index, writer=writer, values={"filler": "x" * (index % 3000)})


@pytest.mark.multiprocess
def test_four_processes_lose_nothing(journal: Journal) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(str(journal.path), w, 250)) for w in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    records = read_journal(journal.path)
    for writer in range(4):
        assert [r["nimg"] for r in records if r["writer"] == writer] == list(range(250))
    assert len(records) == 1000


_LINES = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["event", "metrics", "evaluation", "samples", 3, None]),
            "nimg": st.integers(-5, 2**70) | st.floats() | st.booleans(),
            "time": st.floats() | st.integers(0, 10**400),
        },
        optional={"event": st.sampled_from(["resumed", "started", 1, []]), "path": st.none() | st.text(max_size=5)},
    ).map(lambda value: json.dumps(value).encode()),
)


@given(lines=st.lists(_LINES, max_size=12), end=st.sampled_from([b"", b"\n"]))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "journal.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    for record in read_journal(path):
        assert isinstance(record["kind"], str)
        assert type(record["nimg"]) is int
        assert 0 <= record["nimg"] < 2**63
        assert finite(record["time"]) is not None
    Journal(path).write("event", 7, event="after")
    assert read_journal(path)[-1]["event"] == "after"


def test_deep_nesting_is_skipped(journal: Journal) -> None:
    journal.path.write_bytes(b'{"kind":"event","nimg":1,"time":1,"x":' + b"[" * 200_000 + b"\n")
    journal.write("event", 2)
    assert [r["nimg"] for r in read_journal(journal.path)] == [2]
