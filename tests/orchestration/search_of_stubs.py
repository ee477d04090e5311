"""Runs searches whose trials train nothing: what a trial is worth is a function of its settings.

As a program, `python -m tests.orchestration.search_of_stubs DIRECTORY...`, it drives them to their ends, one after
another, from where they stand: a process that a test can kill.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import yaml

from bessemer.errors import EvaluationError
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.orchestration.search import prepare_search, run_search
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.orchestration.search_final import Judged
from bessemer.spec.search import FinalSpec, SearchSpec
from bessemer.spec.search_load import load_search
from bessemer.spec.space import Space
from bessemer.tracking.search_journal import SearchJournal, read_search
from bessemer.training.checkpoint_files import FORMAT, MANIFEST, STATE, complete_checkpoints, kimg_name, write_json

__all__ = ["DECAY", "RATE", "final_worth", "finished_search", "history", "make_search", "worth"]

RATE, DECAY = "training.optimizers.generator.lr", "training.lr_schedule.decay"
JOB: dict[str, Any] = {
    "name": "base",
    "system": {"name": "bigan", "preset": "tiny8"},
    "data": {"path": "/nowhere"},
    "training": {"total_kimg": 9, "batch_size": 16, "slice_size": 8},
    "tracking": {"mlflow": False},
    "resources": {"cpus_per_worker": 0.5},
}
SEARCH: dict[str, Any] = {
    "name": "stubs",
    "job": "job.yaml",
    "space": {RATE: {"loguniform": [1e-5, 1e-2]}, "ema.half_life_kimg": {"uniform": [0.5, 2.0]}},
    "objective": {"metric": "kid_pixels", "rungs_kimg": [1, 2, 3]},
    "searcher": {"name": "random"},
}


def worth(point: dict[str, Any], rung: int) -> float:
    """What a trial is worth: less the nearer its rate is to 1e-4, and the longer it is trained."""
    return abs(math.log10(point[RATE]) + 4.0) + 0.3 / (rung + 1)


def make_search(root: Path, address: str | None, **fields: Any) -> Path:
    """The directory of a new search, which nobody drives yet."""
    root.mkdir()
    (root / "job.yaml").write_text(yaml.safe_dump(JOB))
    (root / "search.yaml").write_text(yaml.safe_dump({**SEARCH, **fields}))
    return SearchDirectory.create(root / "search", *prepare_search(root / "search.yaml", address)).path


def finished_search(root: Path, address: str | None, **fields: Any) -> Path:
    """A search whose six trials are over; t0005 was stopped early, where it was the best of all."""
    final = {"metric": "fd_pixels", "top": 4, "samples": 1000, "draws": 2}
    path = make_search(root, address, budget={"trials": 6}, **{"final": final, **fields})
    journal = SearchJournal(path)
    journal.write("session", number=1)
    rng = Random(0)
    for number in range(6):
        journal.write("trial", trial=number, point=Space(load_search(path / "search.yaml").space).draw(rng))
        for rung in range(3):
            decision = "finish" if rung == 2 else "stop" if number == 5 else "continue"
            fields = {"kimg": rung + 1.0, "standard_error": 0.01, "seconds": 1.0, "values": {}}
            value = 0.01 if number == 5 else 0.1 * (number + 1)
            journal.write("result", trial=number, rung=rung, value=value, decision=decision, **fields)
            if decision == "stop":
                break
        (path / "trials" / f"t{number:04d}").mkdir()
    return path


def history(directory: SearchDirectory, number: int) -> list[list[int]]:
    """Who trained the state that a trial has, at which rungs: what its newest checkpoint holds."""
    found = complete_checkpoints(directory.run_path(number, 0) / "checkpoints")
    known: list[list[int]] = json.loads((found[-1] / STATE).read_text()) if found else []
    return known


def _save(directory: SearchDirectory, number: int, rung: int) -> None:
    """Leave a checkpoint, as a run does, and a line in a file that all trials share."""
    path = directory.run_path(number, 0)
    if not (path / "run.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        RunDirectory.create(path.parent, directory.base, path, directory.provenance)
    checkpoint = path / "checkpoints" / kimg_name(1000 * (rung + 1))
    if not (checkpoint / MANIFEST).is_file():
        state = [*history(directory, number), [number, rung]]
        checkpoint.mkdir(parents=True, exist_ok=True)
        entry = write_json(checkpoint / STATE, state)
        write_json(checkpoint / MANIFEST, {"format": FORMAT, "files": {STATE: entry}})
    with (directory.path / "worked.txt").open("a") as file:
        file.write(f"{number} {rung}\n")


def trial_of_a_stub(config: dict[str, Any]) -> None:
    """A trial as Ray Tune runs it: it reads the journal and reports, as real ones do."""
    from ray import tune

    directory, number = SearchDirectory(Path(config["search"])), int(config["trial"])
    search: SearchSpec = directory.search
    rungs = search.objective.rungs_kimg
    while True:
        trial = read_search(directory.path).trials[number]
        if trial.is_over or trial.rung >= len(rungs):
            return
        time.sleep(0.02)
        _save(directory, number, trial.rung)
        result = {"trial": number, "rung": trial.rung, "rungs": trial.rung + 1, "kimg": rungs[trial.rung]}
        further = json.dumps({name: trial.point[RATE] for name in search.objective.also if name != "device_hours"})
        value = worth(trial.point, trial.rung)
        tune.report({**result, "value": value, "standard_error": 0.01, "seconds": 1.0, "further": further})


def judge_of_a_stub(path: Path, kimg: float, final: FinalSpec, draw: int) -> Judged:
    """What a draw of a finalist is worth. A file in the trial's directory says what goes wrong."""
    with (path.parents[1] / "judged.txt").open("a") as file:
        file.write(f"{path.name} {draw}\n")
    time.sleep(0.1)
    if (path / "broken").exists():
        raise EvaluationError("generated images: 3 of 10 are not finite")
    if (path / "lost").exists():
        (path / "lost").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return Judged(final_worth(path.name, draw) + kimg * final.samples, 0.5, 2.0)


def final_worth(trial: str, draw: int) -> float:
    """Less, and so better, the later the trial; draws differ."""
    return 10.0 * draw - int(trial[1:5])


if __name__ == "__main__":
    from tests.orchestration import search_of_stubs as by_its_name  # workers cannot import __main__

    for path in sys.argv[1:]:
        run_search(
            SearchDirectory.open(Path(path)),
            trainable=by_its_name.trial_of_a_stub,
            judge=by_its_name.judge_of_a_stub,
        )
