"""Decisions of searches, simulated: no Ray cluster, no training."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from tests.orchestration.simulated_search import SEARCH, spec

from bessemer.orchestration.search_points import points_of
from bessemer.orchestration.search_population import Population, copies_at
from bessemer.orchestration.search_schedulers import Clerk, NoisyAsha, scheduler_of
from bessemer.orchestration.search_session import JournalSearcher
from bessemer.spec.search import SearchSpec
from bessemer.spec.space import Space
from bessemer.tracking.search_journal import SearchJournal, read_search

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
NOTHING_STARTS = {"_trial_to_actor": {}, "_actor_manager": SimpleNamespace(is_actor_started=bool)}


class Trial:
    """What schedulers see of Tune's trials."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config, self.status = f"id-{number}", {"trial": number}, "RUNNING"


def trial(number: int) -> Any:
    return Trial(number)


def report(rung: int, value: float, error: float | None = None, **fields: Any) -> dict[str, Any]:
    kimg = float(rung + 1)
    base = {"rung": rung, "rungs": rung + 1, "kimg": kimg, "value": value, "standard_error": error, "seconds": 1.0}
    return {**base, "further": "{}", **fields}


def judge(asha: NoisyAsha, values: list[tuple[float, float]], rung: float = 1.0) -> list[str]:
    decisions = []
    for number, (value, error) in enumerate(values):
        one: Any = trial(number)
        asha.on_trial_add(None, one)  # type: ignore[arg-type]
        decisions.append(asha.on_trial_result(None, one, {"kimg": rung, "value": value, "standard_error": error}))
    return decisions


@pytest.mark.parametrize("mode", ["min", "max"])
def test_asha_keeps_the_best_third_of_those_that_were_there_before(mode: str) -> None:
    values = list(np.random.default_rng(0).normal(size=40))
    sign = 1.0 if mode == "min" else -1.0
    found = judge(NoisyAsha((1.0, 3.0), 3.0, mode, 1.0), [(sign * v, 0.0) for v in values])
    expected = [
        CONTINUE if not number or value <= np.percentile(values[:number], 100 / 3) else STOP
        for number, value in enumerate(values)
    ]
    assert found == expected
    assert 0 < found.count(CONTINUE) < 25


def test_asha_spares_a_trial_within_one_standard_error_of_the_cut() -> None:
    others = [(float(value), 0.0) for value in range(1, 8)]  # the cut of 1, ..., 7 at one in three is 3
    for value, error, decision in ((3.4, 0.5, CONTINUE), (3.6, 0.5, STOP), (3.4, 0.3, STOP), (2.9, 0.0, CONTINUE)):
        assert judge(NoisyAsha((1.0, 3.0), 3.0, "min", 1.0), [*others, (value, error)])[-1] == decision, (value, error)
    assert judge(NoisyAsha((1.0, 3.0), 3.0, "min", 0.0), [*others, (3.4, 0.5)])[-1] == STOP
    assert judge(NoisyAsha((1.0, 3.0), 3.0, "max", 1.0), [(-v, e) for v, e in [*others, (3.4, 0.5)]])[-1] == CONTINUE


def test_every_rung_has_a_cut_of_its_own() -> None:
    """The best third of the second rung is that of those who came there, whatever they were worth before."""
    asha = NoisyAsha((1.0, 3.0, 9.0), 3.0, "min", 1.0)
    first = judge(asha, [(value, 0.0) for value in (7.0, 6.0, 5.0, 4.0)])
    assert first == [CONTINUE] * 4
    found = [
        asha.on_trial_result(None, trial(n), {"kimg": 3.0, "value": v, "standard_error": 0.0})
        for n, v in enumerate((0.1, 0.9, 0.05, 0.5))
    ]  # type: ignore[arg-type]
    assert found == [CONTINUE, STOP, CONTINUE, STOP]


def test_respecting_the_noise_loses_the_best_trial_less_often() -> None:
    """27 trials of known worth, measured with noise: the plain cut drops the best one more often."""
    kept = {0.0: 0, 1.0: 0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        worth = rng.permutation(np.linspace(0.0, 1.0, 27))
        noisy = [(float(w + rng.normal(scale=0.3)), 0.3) for w in worth]
        for errors in kept:
            found = judge(NoisyAsha((1.0, 3.0), 3.0, "min", errors), noisy)
            kept[errors] += found[int(worth.argmin())] == CONTINUE
    assert kept[1.0] > kept[0.0] + 10
    assert kept[1.0] > 135


def clerk_of(search: SearchSpec, journal: SearchJournal) -> Clerk:
    inner = scheduler_of(search, journal, lambda: None, lambda point: True)
    return Clerk(search, journal, inner, points_of(search, journal.table), 1)


def begin(clerk: Clerk, journal: SearchJournal, count: int, start: int = 0) -> list[Any]:
    trials = [trial(number) for number in range(start, start + count)]
    for one in trials:
        number = one.config["trial"]
        if number not in journal.table.trials:
            point = {"training.optimizers.generator.lr": 1e-4 * (number + 1), "ema.half_life_kimg": 1.0}
            journal.write("trial", trial=number, point=point)
        clerk.on_trial_add(SimpleNamespace(get_live_trials=list), one)
    return trials


def test_what_is_decided_is_in_the_journal_before_tune_acts(journal: SearchJournal, tmp_path: Path) -> None:
    clerk = clerk_of(spec(), journal)
    first, second = begin(clerk, journal, 2)
    assert clerk.on_trial_result(None, first, report(0, 0.1)) == CONTINUE
    assert read_search(tmp_path).trials[0].results[0].decision == "continue"
    assert clerk.on_trial_result(None, second, report(0, 0.9)) == STOP
    assert read_search(tmp_path).trials[1].state == "stopped"
    assert clerk.on_trial_result(None, first, report(0, 0.5)) == CONTINUE  # again, by a worker that was replaced
    assert [r.value for r in read_search(tmp_path).trials[0].results] == [0.1]
    assert (tmp_path / "search.jsonl").read_text().count('"kind":"result"') == 2, "it is not even written down"
    assert clerk.on_trial_result(None, first, report(1, 0.1)) == CONTINUE
    assert clerk.on_trial_result(None, first, report(2, 0.1)) == STOP
    assert read_search(tmp_path).trials[0].state == "finished"


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_new_session_decides_as_the_old_one_would_have(
    journal: SearchJournal, tmp_path: Path, scheduler: str
) -> None:
    search = spec(scheduler={"name": scheduler}, budget={"trials": 40})
    old, alone = clerk_of(search, journal), SimpleNamespace(get_live_trials=list)
    for one, value in zip(begin(old, journal, 12), np.random.default_rng(1).normal(size=12), strict=True):
        old.on_trial_result(alone, one, report(0, float(value)))
    new_journal = SearchJournal(tmp_path)
    new = clerk_of(search, new_journal)
    live = [number for number, known in new_journal.table.trials.items() if not known.is_over]
    assert 0 < len(live) < 12
    for number in live:
        begin(new, new_journal, 1, number)
    for value in np.linspace(-2, 2, 9):
        number = len(journal.table.trials)
        (before,), (after,) = begin(old, journal, 1, number), begin(new, new_journal, 1, number)
        results = [c.on_trial_result(alone, t, report(0, float(value))) for c, t in ((old, before), (new, after))]
        assert results[0] == results[1], value


def test_a_failed_trial_is_over(journal: SearchJournal) -> None:
    clerk = clerk_of(spec(), journal)
    first, second = begin(clerk, journal, 2)
    first.max_failures = 2
    # It ends with an error of its own, and is not tried again.
    assert clerk.on_trial_result(None, first, {"failed": "the loss was not finite", "rung": 0}) == CONTINUE
    assert first.max_failures == 0
    assert journal.table.trials[0].reason == "the loss was not finite"
    assert clerk.on_trial_result(None, second, report(0, 9.0)) == CONTINUE  # nobody to compare with


@pytest.mark.parametrize(
    ("budget", "rungs"),
    [({"kimg": 2.5}, 3), ({"kimg": 2.0}, 2), ({"device_hours": 2.5 / 3600}, 3), ({"hours": 1e-9}, 1), ({}, 6)],
)
def test_a_budget_ends_trials_at_their_next_rung(journal: SearchJournal, budget: dict[str, float], rungs: int) -> None:
    clerk = clerk_of(spec(budget={"trials": 8, **budget}, scheduler={"name": "none"}), journal)
    trials = begin(clerk, journal, 2)
    judged = 0
    for rung in range(3):
        for one in trials:
            if not journal.table.trials[one.config["trial"]].is_over:
                clerk.on_trial_result(None, one, report(rung, 0.5))
                judged += 1
            if clerk.spent():
                break
        if clerk.spent():
            break
    assert judged == rungs
    assert clerk.spent() == bool(budget)
    # Whoever reaches the limit is stopped by it, at once.
    decisions = [result.decision for one in journal.table.trials.values() for result in one.results]
    assert decisions.count("budget") == bool(budget)


@pytest.mark.parametrize(("budget", "seeds", "workers"), [({"kimg": 3.5}, 2, 1), ({"device_hours": 3.5 / 3600}, 1, 2)])
def test_a_budget_counts_all_seeds_and_all_workers(
    journal: SearchJournal, budget: dict[str, float], seeds: int, workers: int
) -> None:
    search = spec(budget={"trials": 8, **budget}, scheduler={"name": "none"}, workers=workers)
    inner = scheduler_of(search, journal, lambda: None, lambda point: True)
    clerk = Clerk(search, journal, inner, points_of(search, journal.table), seeds)
    first, second = begin(clerk, journal, 2)
    assert clerk.on_trial_result(None, first, report(0, 0.5)) == CONTINUE  # 2 kimg
    assert clerk.on_trial_result(None, second, report(0, 0.5)) == STOP  # 4


def population(
    journal: SearchJournal, values: list[float], error: float = 0.0, mode: str = "min", **scheduler: Any
) -> SearchSpec:
    objective = {**SEARCH["objective"], "mode": mode}
    search = spec(scheduler={"name": "pbt", **scheduler}, budget={"trials": len(values)}, objective=objective)
    for number in range(len(values)):
        journal.write("trial", trial=number, point=Space(search.space).draw(Random(number)))
    for number, value in enumerate(values):
        fields = {"kimg": 1.0, "standard_error": error, "seconds": 1.0, "values": {}}
        journal.write("result", trial=number, rung=0, value=value, decision="pause", **fields)
    return search


@pytest.mark.parametrize("name", ["pbt", "pb2"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_worst_quarter_copies_the_best_quarter(journal: SearchJournal, name: str, mode: str) -> None:
    values = [0.5, 0.1, 0.9, 0.4, 0.2, 0.8, 0.3, 0.6]
    search = population(journal, values if mode == "min" else [1 - value for value in values], mode=mode, name=name)
    copies = copies_at(search, journal.table, 0)
    assert [copy["trial"] for copy in copies] == [2, 5]
    assert {copy["donor"] for copy in copies} <= {1, 4}
    for copy in copies:
        assert Space(search.space).holds(copy["point"])
        assert copy["point"] != journal.table.trials[copy["donor"]].point
    assert copies_at(search, journal.table, 0) == copies
    assert json.loads(json.dumps(copies)) == copies


def test_copies_go_on_near_their_donor(journal: SearchJournal) -> None:
    search = population(journal, [0.5, 0.1, 0.9, 0.4], resample=0.0)
    ((copy,), field) = copies_at(search, journal.table, 0), "ema.half_life_kimg"
    donor, copier = (journal.table.trials[copy[who]].point[field] for who in ("donor", "trial"))
    near = [min(2.0, max(0.5, donor * factor)) for factor in (0.8, 1.2)]
    assert any(copy["point"][field] == pytest.approx(value) for value in near)
    assert all(copy["point"][field] != pytest.approx(copier * factor) for factor in (0.8, 1.2))


def test_pb2_models_how_settings_improved_trials(journal: SearchJournal) -> None:
    """Trials gain the more, the smaller the half-life: the model's step must go there."""
    search = spec(
        scheduler={"name": "pb2"},
        budget={"trials": 8},
        space={"ema.half_life_kimg": {"uniform": [0.5, 2.0]}},
    )
    lives = np.linspace(0.5, 2.0, 8)
    for number, life in enumerate(lives):
        journal.write("trial", trial=number, point={"ema.half_life_kimg": float(life)})
    for rung in range(2):
        for number, life in enumerate(lives):
            fields = {"kimg": rung + 1.0, "standard_error": 0.0, "seconds": 1.0, "values": {}}
            value = 1.0 - rung * (2.0 - life) / 3
            journal.write("result", trial=number, rung=rung, value=value, decision="pause", **fields)
    copies = copies_at(search, journal.table, 1)
    assert len(copies) == 2
    # the first goes where the model says; the second explores, since the first is about to be known
    assert copies[0]["point"]["ema.half_life_kimg"] < 1.0


def test_a_population_copies_nothing_that_noise_could_explain(journal: SearchJournal) -> None:
    values = [0.5, 0.1, 0.9, 0.4]
    assert copies_at(population(journal, values, error=1.0), journal.table, 0) == []
    (copy,) = copies_at(spec(scheduler={"name": "pbt", "standard_errors": 0.5}), journal.table, 0)
    assert copy["trial"] == 2, "0.8 worse than the best, more than half of its error"


def test_settings_that_are_no_legal_job_are_not_taken(journal: SearchJournal) -> None:
    search = population(journal, [0.5, 0.1, 0.9, 0.4])
    (copy,) = copies_at(search, journal.table, 0, lambda point: False)
    assert copy["point"] == journal.table.trials[1].point


def test_a_population_waits_for_all_of_it(journal: SearchJournal) -> None:
    search = spec(scheduler={"name": "pbt"}, budget={"trials": 4})
    done: list[int] = []
    inner = Population(search, journal, lambda: done.append(len(journal.table.exchanges)), lambda point: True)
    clerk = Clerk(search, journal, inner, points_of(search, journal.table), 1)
    trials = begin(clerk, journal, 4)
    controller = SimpleNamespace(get_trials=lambda: trials, **NOTHING_STARTS)
    for one in trials:
        one.status = "PENDING"
    for one, value in zip(trials[:3], (0.1, 0.5, 0.9), strict=True):
        assert clerk.on_trial_result(controller, one, report(0, value)) == TrialScheduler.PAUSE
        one.status = "PAUSED"
    assert clerk.choose_trial_to_run(controller) is trials[3]
    trials[3].status = "RUNNING"
    assert clerk.choose_trial_to_run(controller) is None
    assert done == []
    clerk.failed(journal.table.trials[3], "lost")
    trials[3].status = "ERROR"
    assert done == [1], "the population without the failed trial stands at the rung"
    assert not inner.stands(is_whole=False), "they exchange once"
    assert clerk.choose_trial_to_run(controller) is trials[0]
    (copy,) = journal.table.exchanges[0]["copies"]
    assert (copy["trial"], copy["donor"]) == (2, 0)


def test_a_population_waits_for_those_that_have_not_begun(journal: SearchJournal) -> None:
    search = spec(scheduler={"name": "pbt"}, budget={"trials": 4})
    inner = Population(search, journal, lambda: None, lambda point: True)
    clerk = Clerk(search, journal, inner, points_of(search, journal.table), 1)
    for one, value in zip(begin(clerk, journal, 3), (0.1, 0.5, 0.9), strict=True):
        clerk.on_trial_result(None, one, report(0, value))
    assert not inner.stands(is_whole=False)
    assert inner.stands(is_whole=True)


def test_a_population_that_stood_at_a_rung_when_its_driver_died_goes_on(journal: SearchJournal) -> None:
    """Killed after the last result, and before the exchange: nobody will report again who could set it off."""
    search = population(journal, [0.5, 0.1, 0.9, 0.4])
    clerk = clerk_of(search, journal)
    assert journal.table.exchanges == {}
    clerk.settle()
    (copy,) = journal.table.exchanges[0]["copies"]
    assert (copy["trial"], copy["donor"]) == (2, 1)
    clerk.settle()
    assert list(journal.table.exchanges) == [0]
    directory: Any = SimpleNamespace(search=search, base=None, path="somewhere")
    searcher = JournalSearcher(directory, journal, points_of(search, journal.table), clerk)
    assert [searcher.suggest(f"a{n}")["trial"] for n in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("begun", [4, 3])
def test_a_budget_ends_a_population_as_a_whole(journal: SearchJournal, begun: int) -> None:
    """Also where it is spent before the last of it were begun: nobody waits for those."""
    over: list[int] = []
    search = spec(scheduler={"name": "pbt"}, budget={"trials": 4, "kimg": 2.0})
    inner = Population(search, journal, lambda: None, lambda point: True)
    known = journal.table.trials
    clerk = Clerk(
        search, journal, inner, points_of(search, journal.table), 1, over=lambda trial: over.append(trial.number)
    )
    trials = begin(clerk, journal, begun)
    for number, one in enumerate(trials):
        assert over == [], "those that come to the rung later have the same chance"
        one.status = "RUNNING"
        assert clerk.on_trial_result(None, one, report(0, 0.1 * number)) == TrialScheduler.PAUSE
        one.status = "PAUSED"
    assert over == list(range(begun))
    assert [(trial.state, trial.rung, trial.reason) for trial in known.values()] == [
        ("stopped", 1, "the budget was spent")
    ] * begun
    assert journal.table.exchanges == {}
    # Each runs once more, to hear that it is over.
    assert clerk.choose_trial_to_run(SimpleNamespace(get_trials=lambda: trials, **NOTHING_STARTS)) is trials[0]  # type: ignore[arg-type]


def test_a_resumed_population_is_handed_only_those_that_do_not_wait(journal: SearchJournal) -> None:
    search = population(journal, [0.5, 0.1])
    search = search.model_copy(update={"budget": search.budget.model_copy(update={"trials": 4})})
    for number in (2, 3):
        journal.write("trial", trial=number, point=Space(search.space).draw(Random(number)))
    clerk = clerk_of(search, journal)
    directory: Any = SimpleNamespace(search=search, base=None, path="somewhere")
    searcher = JournalSearcher(directory, journal, points_of(search, journal.table), clerk)
    assert [searcher.suggest(f"a{index}") for index in range(3)] == [
        {"search": "somewhere", "trial": 2},
        {"search": "somewhere", "trial": 3},
        None,
    ]
    journal.write("exchange", rung=0, copies=[])
    assert [searcher.suggest(f"b{index}") for index in range(3)] == [
        {"search": "somewhere", "trial": 0},
        {"search": "somewhere", "trial": 1},
        JournalSearcher.FINISHED,
    ]
