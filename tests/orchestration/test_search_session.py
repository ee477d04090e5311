"""Who is tried next in a session of Ray Tune, simulated: no Ray cluster, no training."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from tests.orchestration.search_of_stubs import RATE, make_search
from tests.orchestration.simulated_search import spec

from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.orchestration.search_points import points_of
from bessemer.orchestration.search_schedulers import Clerk, scheduler_of
from bessemer.orchestration.search_session import JournalSearcher
from bessemer.spec.search import SearchSpec
from bessemer.spec.space import Point, Space
from bessemer.tracking.search_journal import SearchJournal

FINISHED = JournalSearcher.FINISHED
POINT = {RATE: 1e-4, "ema.half_life_kimg": 1.0}


def clerk_of(search: SearchSpec, journal: SearchJournal) -> Clerk:
    inner = scheduler_of(search, journal, lambda: None, lambda point: True)
    return Clerk(search, journal, inner, points_of(search, journal.table), 1)


def searcher_of(path: Path, room: int = 100) -> tuple[JournalSearcher, SearchJournal, Clerk]:
    directory, journal = SearchDirectory(path), SearchJournal(path)
    clerk = clerk_of(directory.search, journal)
    points = points_of(directory.search, journal.table)
    return JournalSearcher(directory, journal, points, clerk, lambda: room), journal, clerk


def judge(journal: SearchJournal, number: int, decision: str, kimg: float = 1.0, rung: int = 0) -> None:
    fields = {"kimg": kimg, "standard_error": 0.1, "seconds": 1.0, "values": {}}
    journal.write("result", trial=number, rung=rung, value=0.5, decision=decision, **fields)


def handed(searcher: JournalSearcher, count: int) -> list[Any]:
    found = [searcher.suggest(f"id-{index}") for index in range(count)]
    return [one["trial"] if isinstance(one, dict) else one for one in found]


def test_what_an_earlier_session_left_comes_first_and_nothing_comes_twice(tmp_path: Path) -> None:
    path = make_search(tmp_path / "a", None, budget={"trials": 5})
    _, journal, _ = searcher_of(path)
    for number in range(4):
        journal.write("trial", trial=number, point=POINT)
    judge(journal, 0, "stop")
    judge(journal, 1, "continue")
    journal.write("failed", trial=2, reason="it diverged")
    searcher, journal, _ = searcher_of(path)
    assert handed(searcher, 5) == [1, 3, 4, FINISHED, FINISHED]
    assert list(journal.table.trials) == [0, 1, 2, 3, 4]


def test_a_spent_budget_begins_no_trial_and_lets_go_on_what_began(tmp_path: Path) -> None:
    path = make_search(tmp_path / "a", None, budget={"trials": 5, "kimg": 2.0})
    _, journal, _ = searcher_of(path)
    for number in range(2):
        journal.write("trial", trial=number, point=POINT)
        judge(journal, number, "continue")
    searcher, journal, _ = searcher_of(path)
    assert handed(searcher, 3) == [0, 1, FINISHED]


def test_a_point_that_is_no_legal_job_is_left_out_and_another_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_search(tmp_path / "a", None, budget={"trials": 3})
    legal = {**POINT, RATE: 2e-4}
    drawn = itertools.cycle([{**POINT, RATE: -1.0}, {**POINT, RATE: -2.0}, legal])

    def draw(self: Space, rng: Random) -> Point:
        return next(drawn)

    monkeypatch.setattr(Space, "draw", draw)
    searcher, journal, _ = searcher_of(path)
    assert handed(searcher, 3) == [0, 1, 2]
    assert [trial.point for trial in journal.table.trials.values()] == [legal] * 3
    assert journal.table.refused == 6
    assert RATE in (path / "search.jsonl").read_text()


def test_a_space_without_legal_points_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_search(tmp_path / "a", None, budget={"trials": 3})
    monkeypatch.setattr(Space, "draw", lambda self, rng: {**POINT, RATE: -1.0})
    searcher, journal, _ = searcher_of(path)
    assert handed(searcher, 2) == [FINISHED, FINISHED]
    assert not journal.table.trials


def test_a_trial_that_was_stopped_while_it_waited_is_over(tmp_path: Path) -> None:
    """Brackets end trials that wait: Tune then says that they are complete, and nobody judged them."""
    searcher, journal, _ = searcher_of(make_search(tmp_path / "a", None, budget={"trials": 3}))
    assert handed(searcher, 3) == [0, 1, 2]
    judge(journal, 0, "pause")
    judge(journal, 1, "stop")
    judge(journal, 2, "continue")
    for index, error in enumerate((False, False, True)):
        searcher.on_trial_complete(f"id-{index}", None, error)
    states = [(trial.state, trial.reason) for trial in journal.table.trials.values()]
    assert states == [("stopped", "others of its bracket were better"), ("stopped", None), ("running", None)]


class TuneTrial:
    """What schedulers see of Tune's trials."""

    def __init__(self, number: int, status: str) -> None:
        self.trial_id, self.config, self.status = f"id-{number}", {"trial": number}, status


class Controller:
    """What a scheduler sees of Tune: its trials, and who of them has a process, or a place where one starts."""

    def __init__(self, *statuses: str, starting: tuple[int, ...] = ()) -> None:
        self.trials = [TuneTrial(number, status) for number, status in enumerate(statuses)]
        self._trial_to_actor = {one: one.trial_id for one in self.trials if one.status == "PENDING"}
        places = {f"id-{number}" for number in starting}
        self._actor_manager = SimpleNamespace(is_actor_started=lambda actor: actor in places)

    def get_trials(self) -> list[TuneTrial]:
        return self.trials

    def get_live_trials(self) -> list[TuneTrial]:
        return [one for one in self.trials if one.status != "TERMINATED"]


@pytest.mark.parametrize("scheduler", ["asha", "median", "none"])
def test_a_process_that_starts_is_not_given_up_for_one_that_is_free(journal: SearchJournal, scheduler: str) -> None:
    """Tune gives a free process to whomever the scheduler chooses, and ends the one that starts for it."""
    clerk = clerk_of(spec(scheduler={"name": scheduler}), journal)
    tune: Any = Controller("RUNNING", "PENDING", "PENDING", starting=(1, 2))
    assert clerk.choose_trial_to_run(tune) is None
    tune = Controller("RUNNING", "PENDING", "PENDING", starting=(2,))
    assert clerk.choose_trial_to_run(tune) is tune.trials[1], "it has no place yet"
    tune = Controller("TERMINATED", "PAUSED")
    assert clerk.choose_trial_to_run(tune) is tune.trials[1]


def test_points_are_chosen_no_sooner_than_there_is_room(tmp_path: Path) -> None:
    path = make_search(tmp_path / "a", None, budget={"trials": 4})
    searcher, journal, clerk = searcher_of(path, room=2)
    tune: Any = Controller("RUNNING", "PENDING")
    clerk.choose_trial_to_run(tune)
    assert searcher.suggest("id-2") is None
    assert not journal.table.trials
    for status in ("PAUSED", "TERMINATED"):  # neither needs a process
        tune.trials[0].status = status
        assert handed(searcher, 1) == [0 if status == "PAUSED" else 1]
