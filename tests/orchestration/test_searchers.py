"""Points that searchers choose, simulated: no Ray cluster, no training."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.orchestration.simulated_search import SEARCH, spec

from bessemer.orchestration.search_points import Points, points_of
from bessemer.spec.space import Space
from bessemer.tracking.search_journal import SearchJournal, read_search


def finish(journal: SearchJournal, points: Points, number: int, **worth: Any) -> None:
    """Let a trial be worth the same at all of its three rungs, and end."""
    for rung in range(3):
        fields = {"kimg": rung + 1.0, "seconds": 1.0, "decision": "finish" if rung == 2 else "continue", **worth}
        journal.write("result", trial=number, rung=rung, **fields)
        known = journal.table.trials[number]
        points.judged(known, known.results[-1])
    points.over(known)


@pytest.mark.parametrize("searcher", ["random", "tpe", "gp"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_points_are_a_function_of_seed_and_journal(journal: SearchJournal, tmp_path: Path, searcher: str) -> None:
    space = {
        "training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-3]},
        "training.lr_schedule.decay": {"choice": ["none", "linear"]},
        "training.lr_schedule.final": {"uniform": [0.0, 0.5], "when": {"training.lr_schedule.decay": ["linear"]}},
        "training.batch_size": {"uniform": [16, 64], "step": 16},
    }
    search = spec(space=space, searcher={"name": searcher, "startup": 4}, scheduler={"name": "none"})
    points = points_of(search, journal.table)
    for number in range(8):
        point = points.choose(number, 0)
        assert point is not None
        assert Space(search.space).holds(point), point
        journal.write("trial", trial=number, point=point)
        fields = {"kimg": 1.0, "standard_error": 0.1, "seconds": 1.0, "values": {}}
        for rung in range(3):
            decision = "finish" if rung == 2 else "stop" if number % 3 == 0 and rung == 1 else "continue"
            value = point["training.optimizers.generator.lr"] * (rung + 1)
            journal.write("result", trial=number, rung=rung, value=value, decision=decision, **fields)
            known = journal.table.trials[number]
            points.judged(known, known.results[-1])
            if known.is_over:
                break
        points.over(journal.table.trials[number])
    again = points_of(search, read_search(tmp_path))
    assert points.choose(8, 0) == again.choose(8, 0)


def test_a_grid_is_gone_through_once_and_can_be_pickled(journal: SearchJournal) -> None:
    """Tune pickles a searcher when a session begins."""
    space = {
        "ema.half_life_kimg": {"choice": [0.5, 1.0, 2.0]},
        "training.batch_size": {"uniform": [16, 32], "step": 16},
    }
    search = spec(space=space, searcher={"name": "grid"}, scheduler={"name": "none"}, budget={"trials": 6})
    whole = list(Space(search.space).grid())
    journal.write("trial", trial=0, point=whole[0])
    points = pickle.loads(pickle.dumps(points_of(search, journal.table)))
    assert [points.choose(number, 0) for number in range(1, 7)] == [*whole[1:], None]


@pytest.mark.parametrize("searcher", ["tpe", "gp"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_two_objectives_are_both_looked_for(journal: SearchJournal, tmp_path: Path, searcher: str) -> None:
    """What is worth (x - 1)² and costs (x - 1.5)² is best anywhere between 1 and 1.5, a third of the range."""
    objective = {**SEARCH["objective"], "also": ["fd_efflite0"]}
    space = {"ema.half_life_kimg": {"uniform": [0.5, 2.0]}}
    fields = {"space": space, "objective": objective, "scheduler": {"name": "none"}, "budget": {"trials": 30}}
    search = spec(searcher={"name": searcher, "startup": 8}, **fields)
    points, found = points_of(search, journal.table), []
    for number in range(24):
        point = points.choose(number, 0)
        assert point is not None
        found.append(point["ema.half_life_kimg"])
        journal.write("trial", trial=number, point=point)
        values = {"fd_efflite0": (found[-1] - 1.5) ** 2}
        finish(journal, points, number, value=(found[-1] - 1.0) ** 2, standard_error=0.0, values=values)
    late = [1.0 <= x <= 1.5 for x in found[8:]]
    assert sum(late) > 0.6 * len(late)
    again = points_of(search, read_search(tmp_path))
    assert points.choose(24, 0) == again.choose(24, 0)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("searcher", ["tpe", "bohb"])
def test_a_model_finds_the_good_end_of_a_range(journal: SearchJournal, searcher: str, mode: str) -> None:
    if searcher == "bohb":
        pytest.importorskip("hpbandster", reason="the extra bohb is installed by hand")
    scheduler = "bohb" if searcher == "bohb" else "none"
    objective, sign = {**SEARCH["objective"], "mode": mode}, -1.0 if mode == "max" else 1.0
    fields = {"scheduler": {"name": scheduler}, "objective": objective, "budget": {"trials": 100}}
    search = spec(searcher={"name": searcher, "startup": 6}, **fields)
    points, rates = points_of(search, journal.table), []
    for number in range(40):
        point = points.choose(number, 0)
        assert point is not None
        rates.append(point["training.optimizers.generator.lr"])
        journal.write("trial", trial=number, point=point)
        value = sign * abs(np.log10(rates[-1]) + 4.5)
        finish(journal, points, number, value=value, standard_error=0.1, values={}, kimg=3.0)
    distance = [abs(np.log10(rate) + 4.5) for rate in rates]
    # uniform in the logarithm over two orders of magnitude, the median distance would be 0.5 to 0.75
    assert np.median(distance[20:]) < 0.35


@pytest.mark.parametrize("mode", ["min", "max"])
def test_optuna_knows_what_the_journal_says(journal: SearchJournal, tmp_path: Path, mode: str) -> None:
    """A trial that was stopped counts as pruned where it stood, in the session that saw it and in later ones."""
    search = spec(searcher={"name": "tpe"}, objective={**SEARCH["objective"], "mode": mode})
    points = points_of(search, journal.table)

    def judge(known: Points, number: int, *values: float, decision: str = "continue") -> None:
        trial = journal.table.trials[number]
        for value in values:
            what = decision if value == values[-1] else "continue"
            fields = {"kimg": trial.rung + 1.0, "standard_error": 0.1, "seconds": 1.0, "values": {}}
            journal.write("result", trial=number, rung=trial.rung, value=value, decision=what, **fields)
            known.judged(trial, trial.results[-1])
        if trial.is_over:
            known.over(trial)

    for number in range(4):
        point = points.choose(number, 0)
        assert point is not None
        journal.write("trial", trial=number, point=point)
    judge(points, 0, 0.5, 0.4, 0.3, decision="finish")
    judge(points, 1, 0.9, decision="stop")
    judge(points, 2, 0.6)
    journal.write("failed", trial=3, reason="it diverged")
    points.over(journal.table.trials[3])

    def seen(known: Any) -> list[tuple[str, float | None, dict[int, float]]]:
        return [
            (one.state.name, one.value if one.state.name == "COMPLETE" else None, one.intermediate_values)
            for one in known._study.trials
        ]

    assert points._study.direction.name == ("MINIMIZE" if mode == "min" else "MAXIMIZE")  # type: ignore[attr-defined]
    expected = [
        ("COMPLETE", 0.3, {0: 0.5, 1: 0.4, 2: 0.3}),
        ("PRUNED", None, {0: 0.9}),
        ("RUNNING", None, {0: 0.6}),
        ("FAIL", None, {}),
    ]
    later = points_of(search, read_search(tmp_path))
    assert seen(points) == expected
    assert seen(later) == expected
    # What was under way goes on in the later session.
    judge(later, 2, 0.55, 0.52, decision="finish")
    assert seen(later)[2] == ("COMPLETE", 0.52, {0: 0.6, 1: 0.55, 2: 0.52})
