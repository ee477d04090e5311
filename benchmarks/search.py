#!/usr/bin/env python
"""What a search costs besides training: per trial beside bare Ray Tune, and its bookkeeping with 1,000 trials.

The first part runs 200 trials of an objective that sleeps for one second, 8 at a time, by `bessemer search` and by a
Tuner with the same function, searcher (random) and number of processes. Overhead is wall time beyond the trials' own.
The second writes the journal of a search with 1,000 trials and times `status` and `report`, each as a command of its
own.
"""

from __future__ import annotations

import json
import os
import random
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


def sleeper(config: dict[str, Any]) -> None:
    """A trial of a search that sleeps for a second."""
    from ray import tune

    time.sleep(config.get("seconds", 1.0))
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


def ours(root: Path, trials: int) -> float:
    """Seconds of a search, from its first trial to its end."""
    from bessemer.orchestration.search import run_search
    from bessemer.tracking.search_journal import read_search

    objective = {"metric": "kid_pixels", "rungs_kimg": [1]}
    made = directory(root, objective=objective, budget={"trials": trials}, concurrency=CONCURRENCY)
    run_search(made, trainable=sleeper)
    table = read_search(made.path)
    assert len(table.trials) == trials
    assert all(trial.state == "finished" for trial in table.trials.values())
    ends = [trial.results[-1].time for trial in table.trials.values()]
    return max(ends) - min(trial.began for trial in table.trials.values())


def bare(root: Path, trials: int) -> float:
    """Seconds of Ray Tune by itself, with what it writes by default, from the first trial to the last."""
    from ray import tune

    from bessemer.orchestration.launch import ray_session

    with ray_session(None, CONCURRENCY * 0.5):
        tuner = tune.Tuner(
            tune.with_resources(sleeper, {"CPU": 0.5}),
            param_space={FIELD: tune.loguniform(1e-5, 1e-2), "ema": tune.uniform(0.5, 5.0)},
            tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=CONCURRENCY, reuse_actors=True),
            run_config=tune.RunConfig(name="bare", storage_path=str(root), verbose=0),
        )
        results = tuner.fit()
        begin = min(result.metrics["timestamp"] - result.metrics["time_total_s"] for result in results)
        return float(max(result.metrics["timestamp"] for result in results) - begin)


def part(name: str, trials: int) -> float:
    """One side in a process of its own: settings of Tune are settings of a process."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, __file__, "--part", name, str(trials), root]
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "TUNE_MAX_PENDING_TRIALS_PG": str(CONCURRENCY)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return float(done.stdout.strip().splitlines()[-1])


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
        print({"ours": ours, "bare": bare}[name](Path(root) / name, int(trials)))
        return 0
    options = parse_options(__doc__)
    trials = 12 if options.quick else 200
    seconds = {name: part(name, trials) for name in ("bare", "ours")}
    ideal = trials * 1.0 / CONCURRENCY
    overhead = {name: CONCURRENCY * (value - ideal) / trials for name, value in seconds.items()}
    with tempfile.TemporaryDirectory() as root:
        books = bookkeeping(Path(root) / "books", 1000)
    ratios = [
        Ratio("overhead_s_per_trial_of_search", overhead["ours"]),
        Ratio("overhead_s_per_trial_of_tune", overhead["bare"]),
        Ratio("wall_of_search_over_tune", seconds["ours"] / seconds["bare"], 1.1),
        Ratio("status_of_1000_trials_s", books["status"], 2.0),
        Ratio("importance_of_1000_trials_s", books["importance"], 2.0),
        Ratio("report_of_1000_trials_s", books["first_report"], 2.0),
        Ratio("report_again_of_1000_trials_s", books["report"], 2.0),
    ]
    return finish(ratios, {"trials": trials, "wall": seconds, "overhead": overhead, "bookkeeping": books}, options)


if __name__ == "__main__":
    sys.exit(main())
