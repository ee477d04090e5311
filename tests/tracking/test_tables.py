"""Filters, order, differing fields, exports, comparisons and rankings of runs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bessemer.cli.compare import compare as compare_command
from bessemer.cli.compare import leaderboard as leaderboard_command
from bessemer.cli.runs import runs as runs_command
from bessemer.errors import MachineError, RunError
from bessemer.tracking.comparison import compare_runs
from bessemer.tracking.index import list_runs
from bessemer.tracking.ranking import rank
from bessemer.tracking.summary import RunSummary
from bessemer.tracking.tables import Table, differing, export_table, matching, sorted_rows, value_of


def _change(run: Any, old: str, new: str) -> None:
    job = run.path / "job.yaml"
    assert old in job.read_text()
    job.write_text(job.read_text().replace(old, new))


@pytest.fixture
def rows(make_run: Any, runs_root: Path) -> dict[str, RunSummary]:
    """`good` and `near` cannot be told apart, `bad` is worse, `small` was measured otherwise, `mute` says nothing."""
    for name, kid, protocol in (
        ("good", 0.100, {}),
        ("near", 0.110, {}),
        ("bad", 0.300, {}),
        ("small", 0.010, {"samples": 50, "seed": 3}),
    ):
        run = make_run(name)
        run.event("started", 0)
        run.evaluate(0, 0.7, **protocol)
        run.evaluate(10_000, kid, **protocol)
        run.evaluate(20_000, kid + 0.05, **protocol)
        if name == "near":
            run.evaluate(0, 5.0, metric="fd_efflite0")
        if name == "bad":
            _change(run, "batch_size: 64", "batch_size: 128")
    mute = make_run("mute")
    mute.journal.write("evaluation", 5000, metric="kid_efflite0", value=0.0001)
    return {row.name: row for row in list_runs(runs_root)}


def test_filters(rows: dict[str, RunSummary]) -> None:
    def names(*conditions: str) -> set[str]:
        return {row.name for row in matching(rows.values(), conditions)}

    assert names() == set(rows)
    assert names("training.batch_size>=100") == names("training.batch_size = 128") == {"bad"}
    assert names("kid_efflite0<0.2", "name!=mute") == {"good", "near", "small"}
    assert names("system~GAN", "name~oo") == {"good"}
    assert names("best<0.105", "best>=0.01") == {"good", "small"}
    assert names("tracking.mlflow=true", "workers=2", "kimg=0", "name~l") == {"small"}
    assert names("img_per_s=-", "name=bad") == {"bad"}
    with pytest.raises(RunError, match=r"--where 'best': is no condition.*kid_efflite0<0.2"):
        names("best")
    with pytest.raises(RunError, match=r"--where training.batchsize: no run has such a field.*training.batch_size"):
        names("training.batchsize=3")


def test_order(rows: dict[str, RunSummary]) -> None:
    def names(by: str) -> list[str]:
        return [row.name for row in sorted_rows(rows.values(), by)]

    assert names("kid_efflite0") == ["mute", "small", "good", "near", "bad"]
    assert names("-best")[0] == "bad"
    assert names("-training.batch_size")[0] == "bad"
    assert names("name") == sorted(rows)
    assert names("fd_efflite0")[0] == names("-fd_efflite0")[0] == "near"  # the others have none
    with pytest.raises(RunError, match="--sort speed: no run has such a field"):
        names("speed")


def test_fields_that_differ(rows: dict[str, RunSummary], make_run: Any, runs_root: Path) -> None:
    assert differing([rows["good"], rows["near"]]) == []  # the name does not count
    assert differing(list(rows.values())) == ["training.batch_size"]
    _change(make_run("older"), "evaluation: {metrics: [kid_efflite0, fd_efflite0], samples: 500}\n", "")
    changed = make_run("changed")
    _change(changed, "slice_size: 16", "slice_size: 16, zero_stage: 0, optimizers: {generator: {lr: 0.1}}")
    found = {row.name: row for row in list_runs(runs_root)}
    assert differing([found["good"], found["older"]]) == ["evaluation.metrics", "evaluation.samples"]
    # zero_stage is the default, which need not be written; lr is not
    assert differing([found["good"], found["changed"]]) == ["training.optimizers.generator.lr"]
    assert value_of(found["changed"], "training.optimizers.generator.lr") == 0.1


def test_only_one_protocol_is_ranked_together(rows: dict[str, RunSummary]) -> None:
    main, small, mute = rank(list(rows.values()), "kid_efflite0")
    assert [place.row.name for place in main.places] == ["good", "near", "bad"]
    assert [place.rank for place in main.places] == [1, 2, 3]
    assert [place.tied for place in main.places] == [False, True, False]
    assert main.places[1].sigmas == pytest.approx(0.01 / math.hypot(0.01, 0.01))
    assert main.places[2].behind == pytest.approx(0.2)
    assert main.differs == {}
    assert [place.row.name for place in small.places] == ["small"]
    assert small.differs == {"samples": (50, 500), "seed": (3, 0)}
    assert mute.problem is not None
    assert "generated images, reference, seed of latents, weights sampled, extractor" in mute.problem
    assert rank(list(rows.values()), "fid") == []


@pytest.mark.parametrize("field", ["extractor", "samples", "reference_hash", "extractor_sha256", "seed", "weights"])
def test_each_field_of_the_protocol_parts_boards(make_run: Any, runs_root: Path, field: str) -> None:
    make_run("a").evaluate(1000, 0.1)
    make_run("b").evaluate(1000, 0.2, **{field: "another"})
    boards = rank(list_runs(runs_root), "kid_efflite0")
    assert [len(board.places) for board in boards] == [1, 1]
    assert set(boards[1].differs) == {field}


def test_more_is_better_where_the_records_say_so(make_run: Any, runs_root: Path) -> None:
    for name, value in (("low", 0.2), ("high", 0.9)):
        make_run(name).evaluate(1000, value, metric="recall_efflite0", higher_is_better=True)
    (board,) = rank(list_runs(runs_root), "recall_efflite0")
    assert [(p.row.name, p.behind) for p in board.places] == [("high", 0.0), ("low", pytest.approx(0.7))]


def test_comparison(rows: dict[str, RunSummary]) -> None:
    shown = compare_runs([rows["good"], rows["bad"], rows["small"]])
    assert shown.columns == ("", "good", "bad", "small")
    lines = {str(line[0]).strip(): line[1:] for line in shown.rows}
    assert lines["kid_efflite0, best (lower)"] == ("0.1 ± 0.01", "0.3 ± 0.01", "0.01 ± 0.01")
    assert lines["against the first"] == (
        None,
        "worse, 14.1 standard errors",
        "not comparable: generated images, seed of latents",
    )
    assert lines["training.batch_size"] == ("64", "128", "64")
    assert "training.slice_size" not in lines
    assert "training.slice_size" in {line[0] for line in compare_runs([rows["good"], rows["bad"]], every=True).rows}


def test_exports(tmp_path: Path) -> None:
    table = Table(("name", "best", "mixed"), [("a,b", 0.5, 1), ('=HYPERLINK("x")', None, "two"), ("ü", 1, None)])
    export_table(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert read == [
        ["name", "best", "mixed"],
        ["a,b", "0.5", "1"],
        ['\'=HYPERLINK("x")', "", "two"],
        ["ü", "1", ""],
    ]
    parquet = pytest.importorskip("pyarrow.parquet")
    export_table(table, tmp_path / "t.parquet")
    assert parquet.read_table(tmp_path / "t.parquet").to_pydict() == {
        "name": ["a,b", '=HYPERLINK("x")', "ü"],
        "best": [0.5, None, 1.0],
        "mixed": ["1", "two", None],
    }
    with pytest.raises(MachineError, match=r"t.xlsx: ends with neither"):
        export_table(table, tmp_path / "t.xlsx")
    with pytest.raises(MachineError, match=r"--export .*absent/t.csv: cannot be written"):
        export_table(table, tmp_path / "absent" / "t.csv")


def test_commands(
    rows: dict[str, RunSummary], runs_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.csv"
    runs_command(root=runs_root, where=["kid_efflite0<0.2"], sort="best", params=True, export=out)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["mute", "small", "good", "near"]
    assert len(out.read_text().splitlines()) == 5
    runs_command(root=runs_root, sort="name", params=True, metric="fid")
    shown = capsys.readouterr().out.splitlines()
    assert "training.batch_size" in shown[0]
    assert shown[1].split()[-1] == "128"
    runs_command(root=runs_root, where=["name=nobody"])
    assert "None of the 5 runs" in capsys.readouterr().out

    compare_command(run=["good", str(runs_root / "bad")], root=runs_root, json=True)
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["good", "bad"]
    with pytest.raises(RunError, match=r"^absent: is no run directory"):
        compare_command(run=["good", "absent"], root=runs_root)

    leaderboard_command(root=runs_root)
    shown = capsys.readouterr().out
    assert "3 runs by one protocol" in shown
    assert "2=  near" in shown
    assert "not ranked with those above: generated images 50 instead of 500; seed of latents 3 instead of 0" in shown
    assert "not ranked, because the records do not say: generated images" in shown
    leaderboard_command(root=runs_root, metric="kid_efflite0", json=True, export=tmp_path / "board.csv")
    boards = json.loads(capsys.readouterr().out)["boards"]
    assert [(p["rank"], p["run"], p["tied_with_first"]) for p in boards[0]["places"]] == [
        (1, "good", False), (2, "near", True), (3, "bad", False)
    ]  # fmt: skip
    assert [p["rank"] for p in boards[2]["places"]] == [None]
    assert len((tmp_path / "board.csv").read_text().splitlines()) == 6
    with pytest.raises(RunError, match=r"--metric fid: no run below .* evaluated: fd_efflite0, kid_efflite0\."):
        leaderboard_command(root=runs_root, metric="fid")
