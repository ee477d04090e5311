"""What a search found: importance against functions whose answer is known, the front against brute force, pictures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bessemer.spec.search import SearchSpec
from bessemer.spec.space import Space
from bessemer.tracking.search_figures import draw_pictures
from bessemer.tracking.search_journal import SearchJournal, fold
from bessemer.tracking.search_report import importance, pareto_front, write_report

SEARCH: dict[str, Any] = {
    "name": "mine",
    "job": "job.yaml",
    "space": {
        "training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-3]},
        "ema.half_life_kimg": {"uniform": [0.5, 2.0]},
        "training.lr_schedule.decay": {"choice": ["none", "linear"]},
        "training.lr_schedule.final": {"uniform": [0.0, 0.5], "when": {"training.lr_schedule.decay": ["linear"]}},
    },
    "objective": {"metric": "kid_efflite0", "rungs_kimg": [1, 3]},
    "budget": {"trials": 60},
}


def records(search: SearchSpec, objective: Any, trials: int = 60) -> list[dict[str, Any]]:
    space, found = Space(search.space), []
    for number in range(trials):
        point = space.draw(Random(number))
        found.append({"kind": "trial", "trial": number, "point": point})
        for rung in range(1 + number % 2):
            decision = "finish" if rung else "stop" if number % 2 == 0 else "continue"
            fields = {"kimg": float(3**rung), "seconds": 10.0 + number, "standard_error": 0.01, "values": {}}
            value = objective(point) / (rung + 1)
            found.append(
                {"kind": "result", "trial": number, "rung": rung, "value": value, "decision": decision, **fields}
            )
    return [{**record, "time": 1000.0 + index} for index, record in enumerate(found)]


@pytest.mark.parametrize("field", list(SEARCH["space"])[:3])
def test_the_field_that_decides_is_the_most_important(field: str) -> None:
    search = SearchSpec.model_validate(SEARCH)
    worth = {"none": 0.0, "linear": 1.0}
    table = fold(records(search, lambda point: worth.get(point[field], point[field])))
    found = importance(search, table)
    # where decay is none, there is no final: a forest may look at either
    same = {field, "training.lr_schedule.final"} if field.endswith("decay") else {field}
    assert found[0].field in same
    assert sum(one.share for one in found if one.field in same) > 0.7
    assert sum(one.share for one in found) == pytest.approx(1.0)


def test_few_trials_say_nothing() -> None:
    search = SearchSpec.model_validate(SEARCH)
    assert importance(search, fold(records(search, lambda point: 1.0, trials=3))) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=25))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    brute = [i for i, mine in enumerate(points) if not any(dominates(other, mine) for other in points)]
    assert pareto_front(points) == brute


def test_a_report_has_numbers_and_pictures(tmp_path: Path) -> None:
    search = SearchSpec.model_validate(SEARCH)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    journal = SearchJournal(tmp_path)
    rate = "training.optimizers.generator.lr"
    for record in records(search, lambda point: point[rate], trials=20):
        journal.write(record.pop("kind"), **{key: value for key, value in record.items() if key != "time"})
    report = write_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    furthest = [row for row in report["trials"] if row["kimg"] == 3]
    assert len(furthest) == 10
    assert report["trials"][:10] == sorted(furthest, key=lambda row: row["value"])
    assert report["best"] == report["trials"][0]["trial"]
    # later trials took longer: the front holds the first that came so far, and nothing both worse and longer
    front = [row for row in furthest if row["trial"] in report["pareto"]]
    assert min(furthest, key=lambda row: row["device_hours"]) in front
    for a, b in itertools.permutations(front, 2):
        assert not (a["value"] <= b["value"] and a["device_hours"] <= b["device_hours"])
    (tmp_path / "report.html").rename(tmp_path / "old.html")
    assert write_report(tmp_path) == report
    assert not (tmp_path / "report.html").exists(), "nothing happened since: nothing is written again"
    journal.write("session", number=2)
    assert write_report(tmp_path)["sessions"] == 1 + report["sessions"]
    assert (tmp_path / "report.html").exists()
    drawn = draw_pictures(tmp_path, report)
    assert [path.name for path in drawn] == ["importance.png", "parallel.png", "pareto.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0).shape[0] > 3, path


def test_a_search_that_has_just_begun_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    SearchJournal(tmp_path).write("session", number=1)
    report = write_report(tmp_path)
    assert report["trials"] == []
    assert draw_pictures(tmp_path, report) == []
