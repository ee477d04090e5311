"""Every scheduler and searcher under Ray Tune itself, on a cluster that searches join, with trials that train nothing.

The driver is a process of its own, which one test kills again and again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.orchestration.processes import wait_for
from tests.orchestration.search_of_stubs import DECAY, RATE, final_worth, finished_search, history, make_search, worth

from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.spec.search_load import load_search
from bessemer.spec.space import Space
from bessemer.tracking.runs import load_run
from bessemer.tracking.search_journal import SearchTable, read_search

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

TRIALS = 9
STEPS: dict[str, Any] = {RATE: {"loguniform": [1e-5, 1e-2]}, DECAY: {"choice": ["none", "linear"]}}
SEARCHES: dict[str, dict[str, Any]] = {
    "asha": {"scheduler": {"name": "asha"}, "searcher": {"name": "tpe", "startup": 4}, "space": STEPS},
    "median": {"scheduler": {"name": "median"}, "searcher": {"name": "gp", "startup": 4}},
    "hyperband": {"scheduler": {"name": "hyperband"}},
    "pbt": {"scheduler": {"name": "pbt"}},
    "pb2": {"scheduler": {"name": "pb2"}},
    "grid": {
        "scheduler": {"name": "none"},
        "searcher": {"name": "grid"},
        "space": {RATE: {"choice": [1e-5, 1e-4, 1e-3]}, DECAY: {"choice": ["none", "linear"]}},
    },
    "pareto": {
        "scheduler": {"name": "none"},
        "searcher": {"name": "tpe", "startup": 4},
        "objective": {"metric": "kid_pixels", "rungs_kimg": [1], "also": ["fd_pixels", "device_hours"]},
    },
}
BOHB = importlib.util.find_spec("hpbandster") is not None  # the extra bohb is installed by hand
if BOHB:
    SEARCHES["bohb"] = {"scheduler": {"name": "bohb"}, "searcher": {"name": "bohb"}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of one host: what joins it needs in its environment, its address among it."""
    place = tempfile.mkdtemp(prefix="bsm-", dir="/tmp")  # sockets need short paths
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        port, client_port = a.getsockname()[1], b.getsockname()[1]
    added = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--temp-dir", place]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--ray-client-server-port", str(client_port)]
    command += ["--num-cpus", "2", "--include-dashboard", "false", "--min-worker-port", "0", "--max-worker-port", "0"]
    output = Path(place, "output.txt")
    with output.open("w") as file:
        head = subprocess.Popen(command, env={**os.environ, **added}, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for("the cluster", lambda: "Ray runtime started" in output.read_text(), head)
        yield {**added, "address": f"127.0.0.1:{port}"}
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(place, ignore_errors=True)


def drive(cluster: dict[str, str], *directories: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.orchestration.search_of_stubs", *map(str, directories)]
    path = os.pathsep.join([str(Path.cwd()), *sys.path])
    env = {**os.environ, **cluster, "PYTHONPATH": path}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def over(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def done(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of the searches, at their ends."""
    root = tmp_path_factory.mktemp("tune")
    found = {}
    for name, fields in SEARCHES.items():
        trials = 6 if name == "grid" else TRIALS
        found[name] = make_search(root / name, cluster["address"], budget={"trials": trials}, **fields)
    over(drive(cluster, *found.values()))
    return found


def results(table: SearchTable) -> list[tuple[int, int]]:
    return [(trial.number, result.rung) for trial in table.trials.values() for result in trial.results]


@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_search_comes_to_its_end(done: dict[str, Path], name: str) -> None:
    table, search = read_search(done[name]), load_search(done[name] / "search.yaml")
    assert table.ended == "all trials are over"
    assert sorted(table.trials) == list(range(search.budget.trials))
    assert {trial.state for trial in table.trials.values()} <= {"finished", "stopped"}
    assert any(trial.state == "finished" for trial in table.trials.values())
    for trial in table.trials.values():
        assert Space(search.space).holds(trial.point)
        assert trial.retries == 0
        for result in trial.results:
            assert result.value == pytest.approx(worth(result.point, result.rung))
    lines = (done[name] / "search.jsonl").read_text().splitlines()
    judged = Counter((r["trial"], r["rung"]) for r in map(json.loads, lines) if r["kind"] == "result")
    assert set(judged.values()) == {1}
    worked = Counter(tuple(map(int, line.split())) for line in (done[name] / "worked.txt").read_text().splitlines())
    assert worked == judged, "nothing was trained twice, or for nothing"


@pytest.mark.parametrize("name", ["asha", "median", "hyperband", *["bohb"] * BOHB])
def test_bad_trials_are_stopped_and_the_best_is_not(done: dict[str, Path], name: str) -> None:
    table = read_search(done[name])
    stopped = [trial for trial in table.trials.values() if trial.state == "stopped"]
    assert stopped
    best = min(table.trials.values(), key=lambda trial: worth(trial.point, 0))
    assert best.state == "finished"
    assert table.best() is best


@pytest.mark.parametrize("name", ["pbt", "pb2"])
def test_a_population_stays_together_and_shares_its_states(done: dict[str, Path], name: str) -> None:
    table, search = read_search(done[name]), load_search(done[name] / "search.yaml")
    assert sorted(table.exchanges) == [0, 1]
    assert all(trial.rung == 3 for trial in table.trials.values())
    # Nobody is a rung ahead of anybody.
    times = [[trial.results[rung].time for trial in table.trials.values()] for rung in range(3)]
    assert max(times[0]) < min(times[1])
    assert max(times[1]) < min(times[2])
    for rung, record in table.exchanges.items():
        order = sorted(table.trials.values(), key=lambda trial: trial.results[rung].value)
        share = int(TRIALS * search.scheduler.quantile)
        assert {copy["trial"] for copy in record["copies"]} == {trial.number for trial in order[-share:]}
        assert {copy["donor"] for copy in record["copies"]} <= {trial.number for trial in order[:share]}
        for copy in record["copies"]:
            assert table.trials[copy["trial"]].results[rung + 1].point == copy["point"]
    # Who trained the state that each trial ends with, by what the journal says of copies.
    expected: dict[int, list[list[int]]] = {number: [] for number in table.trials}
    for rung in range(3):
        expected = {number: [*known, [number, rung]] for number, known in expected.items()}
        copies = table.exchanges[rung]["copies"] if rung in table.exchanges else []
        expected |= {copy["trial"]: expected[copy["donor"]] for copy in copies}
    directory = SearchDirectory.open(done[name])
    assert {number: history(directory, number) for number in table.trials} == expected
    if name == "pb2":
        return  # its model explores
    first, last = (max(worth(t.results[rung].point, 0) for t in table.trials.values()) for rung in (0, 2))
    assert last < first, "the worst settings are gone"


def test_a_grid_is_gone_through(done: dict[str, Path]) -> None:
    points = [trial.point for trial in read_search(done["grid"]).trials.values()]
    assert sorted((p[RATE], p[DECAY]) for p in points) == sorted(
        (rate, decay) for rate in (1e-5, 1e-4, 1e-3) for decay in ("none", "linear")
    )


def test_further_objectives_are_kept(done: dict[str, Path]) -> None:
    for trial in read_search(done["pareto"]).trials.values():
        assert trial.results[0].values == {"fd_pixels": trial.point[RATE]}


def test_stopped_trials_say_so_themselves(done: dict[str, Path]) -> None:
    """Whoever lists the runs of a search sees at once which of them are over."""
    for name in ("asha", "median", "hyperband"):
        table, directory = read_search(done[name]), SearchDirectory.open(done[name])
        stopped = [trial.number for trial in table.trials.values() if trial.state == "stopped"]
        assert stopped
        for number in stopped:
            assert load_run(directory.run_path(number, 0)).last_word == "stopped"


def final_lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "search.jsonl").read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["kind"] in ("finalists", "final")]


def test_a_final_survives_sigkill_lost_judges_and_a_finalist_that_cannot_be_judged(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    path = finished_search(tmp_path / "final", cluster["address"], concurrency=1)
    (path / "trials" / "t0001" / "broken").touch()
    (path / "trials" / "t0002" / "lost").touch()
    process = drive(cluster, path)
    wait_for("a final value", lambda: any(line["kind"] == "final" for line in final_lines(path)), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = read_search(path)
    assert (before.ended, before.final_is_over) == (None, False)
    assert before.best() is before.trials[0], "half of a final says nothing"
    over(drive(cluster, path))
    table = read_search(path)
    assert (table.ended, table.final_is_over) == ("all trials are over", True)
    assert table.final is not None
    assert table.final.trials == (0, 1, 2, 3), "the best four of those that came furthest"
    lines = final_lines(path)
    assert [line["kind"] for line in lines].count("finalists") == 1
    assert Counter(line["trial"] for line in lines[1:]) == {0: 1, 1: 1, 2: 1, 3: 1}
    for number, trial in before.trials.items():
        assert trial.final is None or table.trials[number].final == trial.final
        assert table.trials[number].results == trial.results
    for number in (0, 2, 3):
        found = table.trials[number].final
        draws = [final_worth(f"t{number:04d}", draw) + 3.0 * 1000 for draw in (0, 1)]
        assert found is not None
        assert found.value == pytest.approx(statistics.mean(draws))
        assert found.standard_error == pytest.approx(statistics.stdev(draws) / math.sqrt(2))
        assert found.seconds == 4.0
    failed = table.trials[1].final
    assert failed is not None
    assert (failed.value, failed.reason) == (None, "generated images: 3 of 10 are not finite")
    assert table.best() is table.trials[3], "the final has the last word"
    judged = Counter((path / "judged.txt").read_text().split("\n")[:-1])
    assert {line for line in judged if judged[line] == 1} >= {"t0003 0", "t0003 1"}
    assert not (path / "worked.txt").exists(), "nothing was trained again"


def test_a_driver_killed_at_any_moment_leaves_a_search_that_ends_the_same(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """One trial at a time, so that the order is known: points, results, decisions are those of an undisturbed one."""
    fields: dict[str, Any] = {**SEARCHES["asha"], "budget": {"trials": 12}, "concurrency": 1}
    undisturbed, killed = (make_search(tmp_path / name, cluster["address"], **fields) for name in ("one", "two"))
    over(drive(cluster, undisturbed))
    # Another moment each time the test runs; the seed is in the message.
    seed = int.from_bytes(secrets.token_bytes(4))
    rng, rounds = Random(seed), int(os.environ.get("BESSEMER_KILLS", "2"))
    journal = killed / "search.jsonl"

    def length() -> int:
        return journal.stat().st_size if journal.exists() else 0

    whole = (undisturbed / "search.jsonl").stat().st_size
    for kill in range(rounds):
        process = drive(cluster, killed)
        enough = rng.randrange(math.ceil(whole * kill / rounds), math.ceil(whole * (kill + 1) / rounds))
        wait_for(f"{enough} bytes", lambda enough=enough: length() >= enough, process)  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    over(drive(cluster, killed))
    first, second = read_search(undisturbed), read_search(killed)
    assert second.sessions > 1, seed
    for number, trial in first.trials.items():
        other = second.trials[number]
        assert (other.point, other.state) == (trial.point, trial.state), (seed, number)
        told = [[(r.rung, r.value, r.decision) for r in one.results] for one in (trial, other)]
        assert told[0] == told[1], (seed, number)
    assert len(second.trials) == len(first.trials), seed
    assert second.ended == "all trials are over"
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.startswith("{")]
    judged = Counter((r["trial"], r["rung"]) for r in lines if r["kind"] == "result")
    assert set(judged.values()) == {1}, seed
