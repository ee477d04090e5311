"""Searches that train: killed with SIGKILL in the middle and resumed, they lose nothing and do nothing twice."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.orchestration.processes import bessemer, torchrun, wait_for

from bessemer.data.packing.pack import pack
from bessemer.data.reading.opening import open_job_data
from bessemer.evaluation.evaluate import evaluate_system
from bessemer.orchestration.search_promote import promoted_job
from bessemer.spec.load import load_job
from bessemer.spec.search_load import load_search
from bessemer.spec.space import Space
from bessemer.systems.snapshot import load_snapshot, newest_snapshot
from bessemer.tracking.journal import read_journal
from bessemer.tracking.runs import load_run
from bessemer.tracking.search_journal import FinalResult, SearchTable, read_search
from bessemer.training.checkpoint_files import complete_checkpoints, nimg_of

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

JOB: dict[str, Any] = {
    "name": "base",
    "seed": 3,
    "system": {"name": "bigan", "preset": "tiny8"},  # three networks, and a second of training
    "training": {"total_kimg": 100, "batch_size": 16, "slice_size": 8, "log_every_kimg": 0.05},
    "ema": {"half_life_kimg": 0.2},
    "checkpoint": {"every_kimg": 0.064},
    "evaluation": {"grid": 2},
    "tracking": {"mlflow": False},
    "resources": {"cpus_per_worker": 0.5},
}
SEARCH: dict[str, Any] = {
    "name": "tiny",
    "job": "job.yaml",
    "space": {"training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-2]}},
    "objective": {"metric": "kid_pixels", "rungs_kimg": [0.128, 0.256], "samples": [16, 32]},
    "searcher": {"name": "random"},
}

OWNER = "BESSEMER_TEST_SEARCH"
"""Variable of the environment by which the processes of a search are found."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("search")
    pack("digits", found / "digits", size=8, mode="L", limit=20)
    return found


def write(root: Path, name: str, job: dict[str, Any], **fields: Any) -> Path:
    """A search file and its job."""
    directory = root / name
    directory.mkdir()
    (directory / "job.yaml").write_text(yaml.safe_dump({**JOB, **job, "data": {"path": str(root / "digits")}}))
    (directory / "search.yaml").write_text(yaml.safe_dump({**SEARCH, **fields}))
    return directory / "search.yaml"


def kill(process: subprocess.Popen[str], directory: Path) -> None:
    """SIGKILL for the driver, Ray and every worker, also those that are being started meanwhile."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    while family:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, 30)
        family = [one for one in psutil.process_iter() if _works_for(one, directory)]
    process.communicate(timeout=60)


def _works_for(process: psutil.Process, directory: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(OWNER) == str(directory) and process.status() != psutil.STATUS_ZOMBIE
    return False


def start(file: Path, directory: Path) -> subprocess.Popen[str]:
    """A search of its own, whose processes :func:`kill` finds."""
    return bessemer("search", file, "--dir", directory, **{OWNER: str(directory)})


def results(table: SearchTable) -> int:
    return sum(trial.rung for trial in table.trials.values())


def judged(directory: Path) -> list[tuple[int, int]]:
    """Trial and rung of every result in the journal, as often as it is there."""
    lines = (directory / "search.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return [(record["trial"], record["rung"]) for record in records if record["kind"] == "result"]


def finish(directory: Path) -> SearchTable:
    process = bessemer("search", "resume", directory)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "best: " in output
    table = read_search(directory)
    assert table.ended == "all trials are over"
    assert set(Counter(judged(directory)).values()) == {1}, "a result counts once"
    return table


def test_asha_survives_sigkill(root: Path) -> None:
    final = {"metric": "fd_pixels", "top": 2, "samples": 24, "draws": 2}
    scheduler = {"name": "asha", "standard_errors": 0}
    file = write(root, "asha", {}, budget={"trials": 4}, scheduler=scheduler, final=final)
    directory = root / "asha" / "search"
    process = start(file, directory)
    wait_for("results", lambda: directory.exists() and results(read_search(directory)) >= 2, process)
    kill(process, directory)
    before = read_search(directory)
    assert before.ended is None
    table = finish(directory)
    for number, known in before.trials.items():
        now = table.trials[number]
        assert now.point == known.point
        assert now.results[: known.rung] == known.results
    assert sorted(table.trials) == [0, 1, 2, 3]
    assert {trial.state for trial in table.trials.values()} == {"finished", "stopped"}
    finished = [trial for trial in table.trials.values() if trial.state == "finished"]
    # Of those that came to the end, the best two were judged once more, and the final says who has won.
    assert table.final is not None
    ranked = sorted(finished, key=lambda trial: trial.results[-1].value)
    assert table.final.trials == tuple(trial.number for trial in ranked[:2])
    for number in table.final.trials:
        check_final(directory / "trials" / f"t{number:04d}", table.trials[number].final)
    winner = table.best()
    assert winner is min(ranked[:2], key=lambda trial: trial.final.value)  # type: ignore[union-attr, arg-type, return-value]
    assert winner is not None
    # Trials that were stopped say so themselves: nobody takes them for running.
    for trial in table.trials.values():
        assert load_run(directory / "trials" / trial.name).state == trial.state
    # The winner as a job: as long as the original one, unless somebody says otherwise.
    text, _ = promoted_job(directory, None, ())
    (root / "asha" / "whole.yaml").write_text(text)
    whole = load_job(root / "asha" / "whole.yaml")
    assert whole.training.optimizers["generator"].lr == winner.point["training.optimizers.generator.lr"]
    assert (whole.training.total_kimg, whole.evaluation.untrained) == (100, True)
    job, run = root / "asha" / "winner.yaml", directory / "trials" / winner.name
    short = [f"--set={field}" for field in ("training.total_kimg=0.256", "evaluation.metrics=[]")]
    promoted = bessemer("search", "promote", directory, "--out", job, *short)
    output, _ = promoted.communicate(timeout=100)
    assert promoted.returncode == 0, output
    # It trains, and the stops at the rungs and the kill changed nothing: in one go it ends with the same weights.
    alone = torchrun(job, root / "asha" / "alone", workers=1)
    output, _ = alone.communicate(timeout=200)
    assert alone.returncode == 0, output
    for name in ("rank-00000.safetensors", "shared.safetensors"):
        ours, theirs = (load_file(r / "checkpoints" / "kimg-000000.256" / name) for r in (run, root / "asha" / "alone"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    samples = [r["samples"] for r in read_journal(run / "journal.jsonl") if r.get("metric") == "kid_pixels"]
    assert samples == [16, 32]
    for name in ("report.json", "report.html"):
        assert (directory / name).is_file()


def check_final(run: Path, found: FinalResult | None) -> None:
    """Compute a final value once more: two draws of 24 images of the last snapshot, from latents of other seeds."""
    system, info = load_snapshot(newest_snapshot(run))
    assert info.nimg == 256
    job = load_job(run / "job.yaml")
    with open_job_data(job.data) as dataset:
        values = [
            evaluate_system(system, info, dataset, ["fd_pixels"], samples=24, seed=job.seed + 1 + draw)[0].value
            for draw in range(2)
        ]
    assert found is not None
    assert found.value == pytest.approx(statistics.mean(values), rel=1e-6)
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(2), rel=1e-5)
    assert values[0] != values[1]


@pytest.mark.parametrize(("workers", "victims"), [(1, (0,)), (2, (1, 0))])
def test_a_lost_worker_costs_a_trial_nothing_but_time(root: Path, workers: int, victims: tuple[int, ...]) -> None:
    """Killed in mid-training, each of a trial's workers in turn: its workers are replaced, and go on from its newest
    checkpoint. The first worker is the process that Tune started, the other an actor of its own.
    """
    file = write(
        root,
        f"lost-{workers}",
        {"checkpoint": {"every_kimg": 0.32}},
        budget={"trials": 1},
        workers=workers,
        scheduler={"name": "none"},
        objective={**SEARCH["objective"], "rungs_kimg": [1.92], "samples": [16]},
    )
    directory = file.parent / "search"
    process, run = start(file, directory), directory / "trials" / "t0000"
    try:
        for number, rank in enumerate(victims):
            before = newest_checkpoint(run)
            wait_for("checkpoints", lambda before=before: newest_checkpoint(run) >= before + 320, process)  # type: ignore[misc]
            os.kill(pid_of(run, rank, workers), signal.SIGKILL)
            retries = number + 1
            wait_for("new workers", lambda n=retries: read_search(directory).trials[0].retries == n, process)  # type: ignore[misc]
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            kill(process, directory)
    assert process.returncode == 0, output
    (trial,) = read_search(directory).trials.values()
    assert (trial.state, trial.retries, trial.rung) == ("finished", len(victims), 1)
    assert judged(directory) == [(0, 0)]
    resumed = [r for r in read_journal(run / "journal.jsonl") if r.get("event") == "resumed"]
    assert len(resumed) == len(victims)
    assert all(event["checkpoint"] is not None and event["nimg"] >= 320 for event in resumed)
    assert resumed[-1]["nimg"] > resumed[0]["nimg"] or len(victims) == 1, "what came after the first loss was kept"


def newest_checkpoint(run: Path) -> int:
    """Images seen there; 0 without one."""
    return max((nimg_of(path) for path in complete_checkpoints(run / "checkpoints")), default=0)


def pid_of(run: Path, rank: int, workers: int) -> int:
    """Process of the newest worker `rank`, as its log says."""
    text = (run / "logs" / f"worker-{rank}.log").read_text()
    return int(re.findall(rf"worker {rank} of {workers}, process (\d+)", text)[-1])


def test_a_population_copies_whole_states_and_survives_sigkill(root: Path) -> None:
    """Four trials with two workers each, two of them at a time, on as many cores as there are."""
    file = write(
        root,
        "pbt",
        {"checkpoint": {"every_kimg": 10}, "training": {**JOB["training"], "zero_stage": 1}},
        budget={"trials": 4},
        workers=2,
        scheduler={"name": "pbt", "standard_errors": 0},
    )
    directory = root / "pbt" / "search"
    process = start(file, directory)
    wait_for("results", lambda: directory.exists() and results(read_search(directory)) >= 3, process, 600)
    kill(process, directory)
    table = finish(directory)
    assert [(trial.state, trial.rung) for trial in table.trials.values()] == [("finished", 2)] * 4
    (copy,) = table.exchanges[0]["copies"]
    values = {number: trial.results[0].value for number, trial in table.trials.items()}
    assert (copy["donor"], copy["trial"]) == (min(values, key=values.get), max(values, key=values.get))  # type: ignore[arg-type]
    copier, donor = (directory / "trials" / f"t{copy[who]:04d}" for who in ("trial", "donor"))
    files = sorted(path.name for path in (copier / "checkpoints" / "kimg-000000.128").glob("*.safetensors"))
    assert files == ["rank-00000.safetensors", "rank-00001.safetensors", "shared.safetensors"]
    for name in files:
        same = [(path / "checkpoints" / "kimg-000000.128" / name).read_bytes() for path in (copier, donor)]
        assert same[0] == same[1]
    pids = {path: set(re.findall(r"of 2, process (\d+)", path.read_text())) for path in directory.rglob("worker-*.log")}
    assert len(set().union(*pids.values())) <= 8, "workers go on with the next trial: two groups in each session"
    copied = load_file(copier / "checkpoints" / "kimg-000000.128" / files[0])
    for network in ("generator", "encoder", "discriminator"):
        assert any(network in key for key in copied), network
    events = [r for r in read_journal(copier / "journal.jsonl") if r["kind"] == "event"]
    names = [event["event"] for event in events]
    assert names.index("copied") < names.index("resumed", names.index("copied"))
    assert Space(load_search(directory / "search.yaml").space).holds(copy["point"])
    assert copy["point"] != table.trials[copy["donor"]].point
    assert load_job(copier / "job.yaml").training.optimizers["generator"].lr == pytest.approx(
        copy["point"]["training.optimizers.generator.lr"]
    )
    # From the same state with other settings, they went apart.
    ends = [load_file(path / "checkpoints" / "kimg-000000.256" / files[0]) for path in (copier, donor)]
    assert any(not torch.equal(value, ends[1][key]) for key, value in ends[0].items())
