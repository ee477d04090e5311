"""Numbers that go wrong: updates are left out, runs go back, runs stop; all workers alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bessemer.errors import TrainingError
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Clock
from bessemer.tracking.journal import Record, read_journal
from bessemer.training.checkpoint_files import kimg_name
from bessemer.training.distributed import Workers
from bessemer.training.guards import Guards, RollBack

Launch = Callable[..., list[dict[str, Tensor]]]


def guarded(
    launch: Launch, run: Path, workers: int, stage: int, *more: object, iterations: int = 10, **job: Any
) -> list[dict[str, Tensor]]:
    words = ["--run", run, "--job", json.dumps(job), *more]
    return launch(workers, stage, iterations, *words, script="guarded_run.py")


def events(run: Path, *names: str) -> list[Record]:
    records = read_journal(run / "journal.jsonl")
    return [r for r in records if r["kind"] == "event" and r["event"] in names]


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("poison", "stage"), [("loss", 0), ("gradient", 0), ("loss", 2), ("gradient", 2)])
def test_one_bad_slice_on_one_worker_leaves_the_update_out_everywhere(
    launch: Launch, tmp_path: Path, poison: str, stage: int
) -> None:
    """The last slice belongs to the second worker. One worker alone computes the same run."""
    bad = ("--poison", poison, "--from", 64, "--to", 65)
    two = guarded(launch, tmp_path / "two", 2, stage, *bad, iterations=6)
    (skipped,) = events(tmp_path / "two", "update_skipped")
    assert skipped["nimg"] == 64
    assert ("nan on worker 1" in skipped["reason"]) == (poison == "loss")
    assert differences(*two) == 0
    assert all(v.isfinite().all() for v in two[0].values())
    (alone,) = guarded(launch, tmp_path / "alone", 1, stage, *bad, iterations=6)
    assert differences(two[0], alone) < 1e-5
    if (poison, stage) == ("loss", 0):
        (sound,) = guarded(launch, tmp_path / "sound", 1, stage, iterations=6)
        assert differences(sound, alone) > 1e-3, "the update must matter for this test to say anything"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_too_many_in_a_row_go_back_and_take_another_way(launch: Launch, tmp_path: Path) -> None:
    """Everything from image 160 on is bad where the run first reads it, and sound where it reads after going back."""
    bad = ("--poison", "gradient", "--from", 160, "--to", 10_000)
    run = tmp_path / "run"
    guards = {"rollback_lr_factor": 0.5}
    first = guarded(launch, run, 2, 0, *bad, guards=guards)
    (back,) = events(run, "rolled_back")
    assert back["nimg"] == 192
    assert back["rollbacks"] == 1
    assert back["lr_factor"] == 0.5
    assert "a gradient of discriminator was not finite in discriminator, 4 times in a row" in back["reason"]
    assert [r["checkpoint"] for r in events(run, "resumed")] == [kimg_name(128)]
    assert differences(*first) == 0

    # Killed before the next checkpoint and resumed from one that knows of no rollback, it goes the same way again.
    for nimg in (256, 320):
        shutil.rmtree(run / "checkpoints" / kimg_name(nimg))
    again = guarded(launch, run, 2, 0, *bad, guards=guards)
    assert [r["rollbacks"] for r in events(run, "rolled_back")] == [1, 1]
    assert differences(first[0], again[0]) == 0
    # After the next checkpoint it knows.
    shutil.rmtree(run / "checkpoints" / kimg_name(320))
    later = guarded(launch, run, 1, 0, *bad, guards=guards)
    assert len(events(run, "rolled_back")) == 2
    assert differences(first[0], later[0]) < 1e-5


DIVERGING = {"training": {"optimizers": {"discriminator": {"name": "sgd", "lr": 3.0}}}}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_a_diverging_learning_rate_stops_the_run(launch: Launch, tmp_path: Path, stage: int) -> None:
    run = tmp_path / "run"
    job = {"training": {**training(stage, 40), **DIVERGING["training"]}, "checkpoint": {"every_kimg": 0.032}}
    states = guarded(launch, run, 2, stage, iterations=40, **job)
    assert [r["rollbacks"] for r in events(run, "rolled_back")] == [1, 2]
    (failed,) = events(run, "failed")
    assert "after 2 rollbacks (guards.max_rollbacks): " in failed["error"]
    assert "Lower training.optimizers.discriminator.lr" in failed["error"]
    assert differences(*states) == 0


def training(stage: int, iterations: int) -> dict[str, Any]:
    return {"total_kimg": iterations * 0.032, "zero_stage": stage}


@pytest.mark.multiprocess
@pytest.mark.slow
def test_cutting_the_learning_rate_saves_the_run(launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = {
        "training": DIVERGING["training"],
        "checkpoint": {"every_kimg": 0.032},
        "guards": {"rollback_lr_factor": 1e-2, "max_rollbacks": 10},
    }
    (state,) = guarded(launch, run, 1, 0, iterations=40, **job)
    backs = events(run, "rolled_back")
    assert [r["lr_factor"] for r in backs] == [pytest.approx(1e-2 ** (i + 1)) for i in range(len(backs))]
    assert len(backs) >= 1
    assert not events(run, "failed")
    assert all(v.isfinite().all() for v in state.values())


@pytest.mark.multiprocess
@pytest.mark.slow
def test_overflows_of_fp16_lower_the_loss_scale_and_no_more(launch: Launch, tmp_path: Path) -> None:
    """Ten steps in a row are left out, which would make a run in fp32 go back: here the loss scale falls instead."""
    run = tmp_path / "run"
    bad = ("--poison", "gradient", "--from", 160, "--to", 320)
    on_gpus = {"gpus_per_worker": 1}  # the job must say so; arithmetic is the same on the CPU
    guarded(launch, run, 1, 0, *bad, training={"precision": "fp16"}, resources=on_gpus)
    assert not events(run, "rolled_back", "update_skipped", "failed")
    last = [r for r in read_journal(run / "journal.jsonl") if r["kind"] == "metrics"][-1]["values"]
    assert last["skipped_steps/discriminator"] >= 10
    assert last["loss_scale/discriminator"] <= 2.0**6


@pytest.mark.multiprocess
@pytest.mark.slow
def test_without_a_checkpoint_the_run_stops(launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    guarded(launch, run, 1, 0, "--poison", "loss", "--from", 0, "--to", 10_000, guards={"max_skips": 0})
    (failed,) = events(run, "failed")
    assert "with no checkpoint from before 0 kimg to go back to (checkpoint.every_kimg" in failed["error"]
    assert "loss/discriminator was nan on worker 0, 1 times in a row (guards.max_skips: 0)" in failed["error"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_sound_run_is_the_same_sanitised(launch: Launch, tmp_path: Path) -> None:
    """Sanitising accepts every update unseen; what layers sum up over the workers must not depend on that."""
    plain = guarded(launch, tmp_path / "plain", 2, 0, iterations=6)
    sanitised = guarded(launch, tmp_path / "sanitised", 2, 0, iterations=6, training={"sanitize_gradients": True})
    assert differences(*sanitised) == 0
    assert differences(plain[0], sanitised[0]) == 0


def guards(**spec: Any) -> Guards:
    job = JobSpec.model_validate(
        {
            "name": "a",
            "seed": 5,
            "system": {"name": "biggan", "preset": "tiny"},
            "data": {"path": "x"},
            "training": {"total_kimg": 1000, "batch_size": 48, "slice_size": 16},
            "guards": spec,
        }
    )
    return Guards(job, Workers(0, 1, torch.device("cpu")), lambda *a, **k: None)


def test_each_rollback_changes_the_random_stream() -> None:
    watch, seeds, positions, factors = guards(max_rollbacks=3, rollback_lr_factor=0.5), [], [], []
    for _ in range(4):
        seeds.append(watch.seed)
        positions.append(watch.data_position(960))
        factors.append(watch.lr_factor)
        if len(seeds) < 4:
            watch.count_rollback(RollBack("x", "y"), Clock(0, 0))
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert positions[0] == 960
    assert len(set(positions)) == 4
    assert all(p % 48 == 0 for p in positions)
    assert factors == [1, 0.5, 0.25, 0.125]
    with pytest.raises(TrainingError, match=r"stopped at 1\.2 kimg after 3 rollbacks \(guards\.max_rollbacks\): x\. y"):
        watch.count_rollback(RollBack("x", "y"), Clock(1200, 3))


def test_a_run_that_gets_no_further_goes_further_back() -> None:
    watch = guards(max_rollbacks=9)
    watch.count_rollback(RollBack("x", "y", latest=900), Clock(1000, 0))
    assert watch.bounds(RollBack("x", "y", latest=900)) == [900]
    watch.went_back(800)
    watch.count_rollback(RollBack("x", "y", latest=850), Clock(950, 0))
    assert watch.bounds(RollBack("x", "y", latest=850)) == [799, 850]
    watch.went_back(600)
    watch.count_rollback(RollBack("x", "y", latest=None), Clock(990, 0))  # still not past 1000
    assert watch.bounds(RollBack("x", "y", latest=None)) == [599, None]
    watch.went_back(400)
    watch.count_rollback(RollBack("x", "y", latest=1500), Clock(2000, 0))
    assert watch.bounds(RollBack("x", "y", latest=1500)) == [1500]


def test_a_checkpoint_never_lowers_the_count() -> None:
    watch, other = guards(), guards()
    before = watch.state_dict()
    watch.count_rollback(RollBack("x", "y"), Clock(0, 0))
    watch.load_state_dict(before)
    assert watch.rollbacks == 1
    other.load_state_dict(watch.state_dict())
    assert other.seed == watch.seed
