"""Signs of collapse: what is measured, when a rule speaks, and tiny GANs that do and do not collapse."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bessemer.errors import TrainingError
from bessemer.spec.job import GuardsSpec
from bessemer.spec.load import load_job
from bessemer.systems.contract import Clock, SystemConfig
from bessemer.tracking.journal import Record, read_journal
from bessemer.training.collapse import CollapseWatch, class_distances, largest_singular_value
from bessemer.training.distributed import Workers
from bessemer.training.guards import RollBack

ALONE = Workers(0, 1, torch.device("cpu"))
SATURATED = {"scores/real": 9.0, "scores/fake": -7.0, "loss/discriminator": 0.002}
HEALTHY = {"scores/real": 0.6, "scores/fake": -0.4, "loss/discriminator": 1.1}
CRITIC = {"scores/real": 90.0, "scores/fake": -70.0, "loss/discriminator": -155.0}


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_distances_are_between_images_of_a_class(labels: list[int]) -> None:
    images = torch.randn(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(len(labels)))
    pairs = [(a, b) for a, b in combinations(range(len(labels)), 2) if labels[a] == labels[b]]
    total = sum(float((images[a].double() - images[b].double()).square().mean().sqrt()) for a, b in pairs)
    found = class_distances(images, torch.tensor(labels))
    assert found[1] == len(pairs)
    assert float(found[0]) == pytest.approx(total, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shape", [(8, 3), (3, 40), (16, 4, 3, 3), (300, 5)])
def test_singular_values_are_near_and_never_above(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    true, found = torch.linalg.svdvals(weight.flatten(1))[0], largest_singular_value(weight)
    assert 0.8 * true < found <= 1.0001 * true
    assert largest_singular_value(torch.zeros(shape)) == 0


@pytest.fixture
def watch(tiny: ModuleType) -> Callable[..., tuple[CollapseWatch, list[dict[str, Any]]]]:
    def make(**spec: Any) -> tuple[CollapseWatch, list[dict[str, Any]]]:
        said: list[dict[str, Any]] = []
        system = tiny.TinyGan(SystemConfig(resolution=2))
        guards = GuardsSpec.model_validate(spec)
        return CollapseWatch(
            guards, system, ALONE, lambda kind, nimg, **more: said.append({"nimg": nimg, **more})
        ), said

    return make


def test_saturation_must_last(watch: Callable[..., tuple[CollapseWatch, list[dict[str, Any]]]]) -> None:
    it, said = watch(saturation={"for_kimg": 10})
    lines = [SATURATED] * 9 + [HEALTHY] + [SATURATED] * 20 + [HEALTHY] + [SATURATED] * 12
    for k, values in enumerate(lines):
        it.logged(values, Clock(1000 * (k + 1), k))
    assert [s["nimg"] for s in said] == [21_000, 42_000]  # once for each time that it lasts
    assert said[0]["rule"] == "saturation"
    assert said[0]["scores_apart"] == 16


def test_few_looks_are_not_enough(watch: Callable[..., tuple[CollapseWatch, list[dict[str, Any]]]]) -> None:
    """With batches of 20,000 images two lines of metrics are far apart, but are two updates."""
    it, said = watch(saturation={"for_kimg": 10})
    for k in range(4):
        it.logged(SATURATED, Clock(20_000 * k, k))
    assert not said
    it.logged(SATURATED, Clock(80_000, 4))
    assert len(said) == 1


@pytest.mark.parametrize("values", [HEALTHY, CRITIC, {"loss/vae": 0.0}])
def test_what_is_not_saturated(
    watch: Callable[..., tuple[CollapseWatch, list[dict[str, Any]]]], values: dict[str, float]
) -> None:
    it, said = watch(saturation={"for_kimg": 1})
    for k in range(50):
        it.logged(values, Clock(1000 * k, k))
    assert not said


def test_squared_errors_need_a_smaller_distance(
    watch: Callable[..., tuple[CollapseWatch, list[dict[str, Any]]]],
) -> None:
    """Least squares hold the scores to 1 and 0: the default never speaks, that of the jobs does."""
    won = {"scores/real": 0.97, "scores/fake": 0.02, "loss/discriminator": 0.004}
    job = load_job(Path(__file__).parents[2] / "jobs" / "cyclegan-tint.yaml")
    for saturation, alerts in (({}, 0), (job.guards.saturation, 1)):
        it, said = watch(saturation=saturation)
        for k in range(20):
            it.logged(won, Clock(1000 * k, k))
        assert len(said) == alerts


def test_actions_and_memory(watch: Callable[..., tuple[CollapseWatch, list[dict[str, Any]]]]) -> None:
    """What a checkpoint remembers is enough to go on counting."""
    for action, error in (("rollback", RollBack), ("stop", TrainingError)):
        first, _ = watch(saturation={"for_kimg": 10, "action": action})
        for k in range(1, 10):
            first.logged(SATURATED, Clock(1000 * k, k))
        second, said = watch(saturation={"for_kimg": 10, "action": action})
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        second.logged(SATURATED, Clock(10_000, 10))
        with pytest.raises(
            error, match=r"collapse suspected by guards\.saturation \(scores_apart 16, loss 0\.002\)"
        ) as e:
            second.logged(SATURATED, Clock(11_000, 11))
        assert said[0]["action"] == action
        if isinstance(e.value, RollBack):
            assert e.value.latest == 999  # before it began


def collapse_run(
    launch: Callable[..., list[dict[str, Tensor]]],
    run: Path,
    workers: int,
    rates: dict[str, float],
    *more: str,
    iterations: int = 70,
    **guards: Any,
) -> list[Record]:
    """Events of a run with these learning rates."""
    rules: dict[str, Any] = {
        "saturation": {"for_kimg": 0.6},
        "diversity": {"for_kimg": 0.3},
        "spectral": {"within_kimg": 1, "growth": 4},
    }
    job = {
        "training": {"log_every_kimg": 0.064, "optimizers": {n: {"lr": lr} for n, lr in rates.items()}},
        "guards": {
            "every_kimg": 0.032,
            **{k: {**rules[k], **guards.get(k, {})} for k in rules},
            **{k: v for k, v in guards.items() if k not in rules},
        },
    }
    launch(workers, 0, iterations, "--run", run, "--job", json.dumps(job), *more, script="guarded_run.py")
    records = read_journal(run / "journal.jsonl")
    measured = [r["values"] for r in records if r["kind"] == "metrics"]
    assert all({"collapse/diversity", "collapse/sigma_generator"} <= values.keys() for values in measured)
    return [r for r in records if r["kind"] == "event" and r["event"] != "checkpoint"]


Launch = Callable[..., list[dict[str, Tensor]]]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--far",), ("--bounded",)])
def test_no_alarm_over_a_run_that_learns(launch: Launch, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert collapse_run(launch, tmp_path / "run", 1, {}, *more) == []


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_discriminator_that_learns_too_fast_saturates(launch: Launch, tmp_path: Path) -> None:
    (event,) = collapse_run(launch, tmp_path / "run", 2, {"discriminator": 0.03}, "--far", "--without", "r1")
    assert (event["event"], event["rule"], event["action"]) == ("collapse_suspected", "saturation", "warn")
    assert event["scores_apart"] > 2
    assert 0 <= event["loss"] < 0.02


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_generator_with_one_image_left_stops_the_run(launch: Launch, tmp_path: Path) -> None:
    rates = {"generator": 0.1}
    seen, stopped = collapse_run(launch, tmp_path / "run", 2, rates, "--far", "--bounded", diversity={"action": "stop"})
    assert (seen["rule"], seen["action"]) == ("diversity", "stop")
    assert seen["diversity"] < 0.1
    assert stopped["event"] == "failed"
    assert "Lower the generator's learning rate, or set guards.diversity.action to warn." in stopped["error"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_weight_that_grows_fast_makes_the_run_go_back(launch: Launch, tmp_path: Path) -> None:
    rates = {"generator": 1.0}
    spectral = {"action": "rollback", "growth": 2}
    events = collapse_run(
        launch, tmp_path / "run", 1, rates, "--bounded", iterations=30, spectral=spectral, rollback_lr_factor=1e-3
    )
    seen, back, resumed = events[:3]
    assert (seen["rule"], seen["action"]) == ("spectral", "rollback")
    assert seen["weight"].startswith("generator.")
    assert seen["growth"] > 2
    assert "collapse suspected by guards.spectral" in back["reason"]
    assert resumed["nimg"] < seen["nimg"]
    assert [e["event"] for e in events[3:]] == []
