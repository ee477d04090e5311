#!/usr/bin/env python
"""What a search costs besides training: per trial beside bare Ray Tune, and its bookkeeping with 1,000 trials.

The first part runs 200 trials of an objective that sleeps for one second, 8 at a time, by `bessemer search` and by a
Tuner with the same function, searcher (random) and places. Each trial notes when it began and ended, and where. `wall`
is from the start of Ray to the end of the last trial; `overhead` what the 8 places did not sleep meanwhile, per trial;
`start` how long the first trial waits for Ray and for a process; `between` how long a process idles from one trial to
the next. Tune ends processes that are still starting when it can do without, so `processes` may exceed 8 or stay below.
The second writes the journal of a search with 1,000 trials and times `status` and `report`, each as a command of its
own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import Ratio, finish, parse_options

CONCURRENCY = 8
FIELD = "training.optimizers.generator.lr"
SEARCH: dict[str, Any] = {
    "name": "overhead",
    "job": "job.yaml",
    "space": {FIELD: {"loguniform": [1e-5, 1e-2]}, "ema.half_life_kimg": {"uniform": [0.5, 5.0]}},
    "objective": {"metric": "kid_pixels", "rungs_kimg": [1, 3, 9]},
    "scheduler": {"name": "none"},
    "searcher": {"name": "random"},
}
JOB: dict[str, Any] = {
    "name": "base",
    "system": {"name": "biggan", "preset": "tiny32"},
    "data": {"path": "/nowhere"},
    "training": {"total_kimg": 9, "batch_size": 16, "slice_size": 8},
    "tracking": {"mlflow": False},
    "resources": {"cpus_per_worker": 0.5},
}


def sleeper(config: dict[str, Any]) -> None:  # noqa: ARG001
    """A trial of a search that sleeps for a second."""
    from ray import tune

    began = time.time()
    time.sleep(1.0)
    with Path(os.environ["BENCHMARK_TIMES"]).open("a") as file:
        file.write(f"{began} {time.time()} {os.getpid()}\n")
    result = {"rung": 0, "rungs": 1, "kimg": 1.0, "value": random.random(), "standard_error": 0.1}
    tune.report({**result, "seconds": 1.0, "further": "{}"})


def directory(root: Path, **fields: Any) -> Any:
    """A search on disk; its job is never trained."""
    import yaml

    from bessemer.orchestration.search import prepare_search
    from bessemer.orchestration.search_directory import SearchDirectory

    root.mkdir(parents=True)
    (root / "job.yaml").write_text(yaml.safe_dump(JOB))
    (root / "search.yaml").write_text(yaml.safe_dump({**SEARCH, **fields}))
    return SearchDirectory.create(root / "search", *prepare_search(root / "search.yaml"))


def ours(root: Path, trials: int) -> None:
    """A search."""
    from bessemer.orchestration.search import run_search
    from bessemer.tracking.search_journal import read_search

    objective = {"metric": "kid_pixels", "rungs_kimg": [1]}
    made = directory(root, objective=objective, budget={"trials": trials}, concurrency=CONCURRENCY)
    begin(root)
    run_search(made, trainable=sleeper)
    table = read_search(made.path)
    assert len(table.trials) == trials
    assert all(trial.state == "finished" for trial in table.trials.values())


def bare(root: Path, trials: int) -> None:
    """Ray Tune by itself, with what it writes by default."""
    from ray import tune

    from bessemer.orchestration.launch import ray_session

    root.mkdir()
    begin(root)
    with ray_session(None, CONCURRENCY * 0.5):
        tuner = tune.Tuner(
            tune.with_resources(sleeper, {"CPU": 0.5}),
            param_space={FIELD: tune.loguniform(1e-5, 1e-2), "ema": tune.uniform(0.5, 5.0)},
            tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=CONCURRENCY, reuse_actors=True),
            run_config=tune.RunConfig(name="bare", storage_path=str(root), verbose=0),
        )
        assert not tuner.fit().errors


def begin(root: Path) -> None:
    """Note the time, and let trials do so."""
    import ray.tune  # noqa: F401  # the same for both

    os.environ["BENCHMARK_TIMES"] = str(root / "times.txt")
    (root / "times.txt").write_text(f"{time.time()}\n")


def evaluate(times: Path, trials: int) -> dict[str, float]:
    """What the notes of one side say, in seconds."""
    first, *rows = times.read_text().splitlines()
    spans: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        start, end, process = row.split()
        spans.setdefault(process, []).append((float(start), float(end)))
    every = sorted(span for each in spans.values() for span in each)
    assert len(every) == trials, f"{len(every)} trials instead of {trials}"
    idle = [b[0] - a[1] for each in spans.values() for a, b in itertools.pairwise(sorted(each))]
    wall = max(end for _, end in every) - float(first)
    return {
        "wall": wall,
        "overhead": (CONCURRENCY * wall - sum(end - start for start, end in every)) / trials,
        "start": every[0][0] - float(first),
        "between": statistics.mean(idle),
        "processes": len(spans),
    }


def part(name: str, trials: int) -> dict[str, float]:
    """One side in a process of its own: settings of Tune are settings of a process."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, __file__, "--part", name, str(trials), root]
        env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return evaluate(Path(root) / name / "times.txt", trials)


def bookkeeping(root: Path, trials: int) -> dict[str, float]:
    """Seconds of `bessemer search status --importance` and `report` with the journal of an ASHA search."""
    made = directory(root, budget={"trials": trials})
    rng, now, lines = random.Random(0), time.time() - 10 * trials, []

    def write(kind: str, **fields: Any) -> None:
        nonlocal now
        now += 1.0
        lines.append(json.dumps({"kind": kind, "nimg": 0, "time": round(now, 3), **fields}))

    write("session", number=1)
    for number in range(trials):
        point = {FIELD: 10 ** rng.uniform(-5, -2), "ema.half_life_kimg": rng.uniform(0.5, 5.0)}
        write("trial", trial=number, point=point)
        for rung, kimg in enumerate((1.0, 3.0, 9.0)):
            decision = "finish" if rung == 2 else "stop" if rng.random() < 2 / 3 else "continue"
            worth = {"value": rng.random(), "standard_error": 0.05, "seconds": 60.0 * 3**rung, "values": {}}
            write("result", trial=number, rung=rung, kimg=kimg, decision=decision, **worth)
            if decision == "stop":
                break
    write("ended", reason="all trials are over")
    (made.path / "search.jsonl").write_text("\n".join(lines) + "\n")
    seconds = {}
    for name, words in (
        ("status", ["status"]),
        ("importance", ["status", "--importance"]),
        ("first_report", ["report"]),
        ("report", ["report"]),
    ):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "bessemer.cli", "search", words[0], str(made.path), *words[1:]],
            capture_output=True,
            check=True,
        )
        seconds[name] = time.perf_counter() - began
    return seconds


def main() -> int:
    """Measure both parts."""
    if "--part" in sys.argv:
        name, trials, root = sys.argv[-3:]
        {"ours": ours, "bare": bare}[name](Path(root) / name, int(trials))
        return 0
    options = parse_options(__doc__)
    trials = 12 if options.quick else 200
    found = {name: part(name, trials) for name in ("bare", "ours")}
    search, tune = found["ours"], found["bare"]
    with tempfile.TemporaryDirectory() as root:
        books = bookkeeping(Path(root) / "books", 1000)
    ratios = [
        Ratio("overhead_s_per_trial_of_search", search["overhead"]),
        Ratio("overhead_s_per_trial_of_tune", tune["overhead"]),
        Ratio("s_between_trials_of_search", search["between"]),
        Ratio("s_between_trials_of_tune", tune["between"]),
        Ratio("wall_of_search_over_tune", search["wall"] / tune["wall"], 1.1),
        Ratio("status_of_1000_trials_s", books["status"], 2.0),
        Ratio("importance_of_1000_trials_s", books["importance"], 2.0),
        Ratio("report_of_1000_trials_s", books["first_report"], 2.0),
        Ratio("report_again_of_1000_trials_s", books["report"], 2.0),
    ]
    raw = {"trials": trials, "places": CONCURRENCY, "search": search, "tune": tune, "bookkeeping": books}
    return finish(ratios, raw, options)


if __name__ == "__main__":
    sys.exit(main())
