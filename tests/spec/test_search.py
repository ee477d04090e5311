"""Search files: what they may say, the points and corners of their spaces, and the jobs of their trials."""

from __future__ import annotations

import datetime
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bessemer.errors import SpecError
from bessemer.spec.search import DimensionSpec, SearchSpec
from bessemer.spec.search_load import check_corners, dump_search, judged_base, load_base, load_search, trial_job
from bessemer.spec.space import Space

ROOT = Path(__file__).resolve().parents[2]
JOB: dict[str, Any] = {
    "name": "base",
    "system": {"name": "biggan", "preset": "tiny32"},
    "data": {"path": "datasets/digits"},
    "training": {"total_kimg": 50, "batch_size": 16, "slice_size": 8},
    "evaluation": {"metrics": ["fd_efflite0"], "samples": 100, "beside": True},
}
SEARCH: dict[str, Any] = {
    "name": "mine",
    "job": "job.yaml",
    "space": {
        "training.optimizers.generator.lr": {"loguniform": [1e-5, 1e-3]},
        "training.lr_schedule.decay": {"choice": ["none", "linear"]},
        "training.lr_schedule.final": {"uniform": [0.0, 0.5], "when": {"training.lr_schedule.decay": ["linear"]}},
    },
    "objective": {"metric": "kid_efflite0", "rungs_kimg": [1, 3, 9], "samples": [100, 400]},
    "budget": {"trials": 8},
}


def write(root: Path, search: dict[str, Any], job: dict[str, Any] | None = None) -> Path:
    (root / "job.yaml").write_text(yaml.safe_dump(job or JOB))
    path = root / "search.yaml"
    path.write_text(yaml.safe_dump(search, sort_keys=False))
    return path


def changed(**fields: Any) -> dict[str, Any]:
    """SEARCH with other values in dotted fields, `__` for dots."""
    search = yaml.safe_load(yaml.safe_dump(SEARCH))
    for name, value in fields.items():
        at = search
        *parents, last = name.split("__")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return search


def test_a_search_survives_being_written(tmp_path: Path) -> None:
    search = load_search(write(tmp_path, SEARCH))
    again = tmp_path / "again.yaml"
    again.write_text(dump_search(search))
    assert load_search(again) == search


def test_the_base_job_has_what_all_trials_share(tmp_path: Path) -> None:
    search = load_search(write(tmp_path, {**changed(workers=2), "set": {"training.precision": "bf16"}}))
    base = load_base(search, tmp_path)
    assert base.training.total_kimg == 9
    assert base.training.precision == "bf16"
    assert base.evaluation.metrics == ("kid_efflite0",)
    assert (base.evaluation.samples, base.evaluation.untrained, base.evaluation.beside) == (100, False, False)
    assert base.resources.workers == 2
    assert [search.samples_at(rung) for rung in range(3)] == [100, 400, 400]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (changed(budget__trails=3), r"budget.trails: unknown field. Did you mean 'trials'\?"),
        (changed(scheduler={"name": "ahsa"}), "scheduler.name: 'ahsa' is not allowed"),
        (changed(space={"seed": {"choice": [1, 2]}}), "space.seed: cannot be varied: all trials have the same seeds"),
        (changed(space={"ema.half_life_kimg": {"uniform": [2.0, 1.0]}}), "upper end not above the lower"),
        (changed(space={"ema.half_life_kimg": {"loguniform": [0.0, 1.0]}}), "reaches 0, which has no logarithm"),
        (changed(space={"ema.half_life_kimg": {}}), "says nothing; give exactly one of"),
        (changed(space={"ema.half_life_kimg": {"uniform": [1.0, 2.0], "step": 0.3}}), "set the end to 1.9"),
        (
            changed(space={"ema.half_life_kimg": {"uniform": [1.0, 2.0], "when": {"ema.rampup": [1]}}}),
            "'ema.rampup' is no field of the space with choices",
        ),
        (
            changed(space={"ema.half_life_kimg": {"choice": [1.0, math.inf]}}),
            "half_life_kimg.choice: inf is not finite",
        ),
        (
            changed(space={"system.config.name": {"choice": ["a", [{"b": datetime.date(2026, 1, 2)}]]}}),
            r"datetime.date\(2026, 1, 2\) is no text.*put it in quotes",
        ),
        ({**SEARCH, "set": {"system.config.channels": math.nan}}, "set.system.config.channels: nan is not finite"),
        ({**SEARCH, "set": {"system.config.names": {1: "a"}}}, "set.system.config.names: {1: 'a'} is no text"),
        (changed(objective__rungs_kimg=[1, 1, 9]), "does not rise"),
        (changed(objective__samples=[100, 50]), r"objective.samples: \[100, 50\] falls"),
        (changed(scheduler={"name": "hyperband"}), r"not evenly spaced.*write \[1.0, 2.0, 3.0\]"),
        (changed(scheduler={"name": "bohb"}), "bohb is both or neither"),
        (changed(searcher={"name": "grid"}), "a grid needs values"),
        (
            changed(scheduler={"name": "bohb"}, searcher={"name": "bohb"}, objective__also=["device_hours"]),
            "set searcher.name to tpe or gp",
        ),
        (
            changed(
                scheduler={"name": "pbt"},
                searcher={"name": "random"},
                objective__rungs_kimg=[1, 2],
                space={"training.batch_size": {"choice": [16, 32]}},
            ),
            "training.batch_size must stay as it was in the checkpoint",
        ),
        ({**SEARCH, "set": {"training.total_kimg": 3}}, "set.training.total_kimg: the search sets it itself"),
        (changed(final={"metric": "fid", "top": 9}), "final.top: 9 finalists of 8 trials"),
        (changed(final={"metric": "fid", "top": 1}), "final.top: 1"),
        (changed(final={"metric": "device_hours"}), "final.metric: device_hours is no metric"),
        (
            changed(final={"metric": "kid_efflite0", "samples": 200, "draws": 2}),
            "2 x 200 images say no more of kid_efflite0 than the 400 of the last rung",
        ),
        (
            changed(final={"metric": "kid_efflite0", "samples": 5000, "mode": "max"}),
            "final.mode: max, and objective.mode is min for the same metric",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, search: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        load_search(write(tmp_path, search))
    assert re.search(r"search.yaml:\d+: ", str(caught.value))


def test_the_final_metric_goes_through_the_rules_of_jobs(tmp_path: Path) -> None:
    search = load_search(write(tmp_path, changed(final={"metric": "fd_efflite0", "samples": 5000})))
    base = load_base(search, tmp_path)
    assert base.evaluation.metrics == ("kid_efflite0",), "rungs have nothing to do with it"
    assert judged_base(search, base).evaluation.metrics == ("kid_efflite0", "fd_efflite0")
    for metric, message in (("fd", "does not name its feature extractor"), ("latency_ms", "leave it out")):
        search = load_search(write(tmp_path, changed(final={"metric": metric})))
        with pytest.raises(SpecError, match=f"final.metric: .*{message}"):
            check_corners(search, load_base(search, tmp_path))
    # Some are no metric at one corner of the space only.
    space = {"ema.batch_norm": {"choice": ["copied", "recomputed"]}}
    search = load_search(write(tmp_path, changed(space=space, final={"metric": "bits_per_dim"})))
    with pytest.raises(SpecError, match=r"1 of 2 corners.*\n.*at ema.batch_norm = recomputed: ema.batch_norm"):
        check_corners(search, load_base(search, tmp_path))


def test_a_grid_must_fit_the_budget(tmp_path: Path) -> None:
    space = {
        "training.batch_size": {"uniform": [16, 48], "step": 16},
        "training.lr_schedule.decay": {"choice": ["none", "linear"]},
        "training.lr_schedule.final": {"choice": [0.0, 0.1], "when": {"training.lr_schedule.decay": ["linear"]}},
    }
    with pytest.raises(SpecError, match="8 of the 9 points of the grid; set it to 9"):
        load_search(write(tmp_path, changed(space=space, searcher={"name": "grid"})))
    points = list(Space(load_search(write(tmp_path, changed(space=space))).space).grid())
    assert len(points) == 3 * (1 + 2)
    assert {point["training.batch_size"] for point in points} == {16, 32, 48}


def test_illegal_corners_are_named_before_anything_starts(tmp_path: Path) -> None:
    space = {
        "training.slice_size": {"choice": [8, 16]},
        "training.batch_size": {"choice": [16, 24]},
        "training.optimizers.generator.lr": {"loguniform": [1e-4, 1e-3]},
    }
    search = load_search(write(tmp_path, changed(space=space)))
    with pytest.raises(SpecError) as caught:
        check_corners(search, load_base(search, tmp_path))
    text = str(caught.value)
    assert "2 of 8 corners are no legal jobs" in text
    assert "space: at training.slice_size = 16, training.batch_size = 24" in text
    assert "training.batch_size: 24 is not a multiple of training.slice_size 16" in text
    # 24 / 8 = 3 slices, 16 / 8 = 2 slices: with two workers 24 has no legal division at all
    two = load_search(write(tmp_path, changed(space=space, workers=2)))
    with pytest.raises(SpecError, match="does not divide the 3 slices"):
        check_corners(two, load_base(two, tmp_path))


def test_an_unknown_field_of_the_job_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    search = load_search(write(tmp_path, changed(space={"training.lr_schedule.finel": {"uniform": [0.0, 0.5]}})))
    with pytest.raises(SpecError, match=r"training.lr_schedule.finel: unknown field. Did you mean 'final'\?"):
        check_corners(search, load_base(search, tmp_path))


def test_corners_are_all_combinations_of_ends_and_choices_where_they_are_active(tmp_path: Path) -> None:
    space = Space(load_search(write(tmp_path, SEARCH)).space)
    found = space.corners()
    rate, decay, final = space.dimensions
    expected = [{rate: lr, decay: "none"} for lr in (1e-5, 1e-3)]
    expected += [{rate: lr, decay: "linear", final: end} for lr in (1e-5, 1e-3) for end in (0.0, 0.5)]
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_many_dimensions_have_a_bounded_number_of_corners_that_shows_every_end() -> None:
    space = Space({f"f{i}": DimensionSpec(uniform=(0.0, 1.0)) for i in range(14)})
    found = space.corners()
    assert len(found) == 1 + 14 + 14 * 13 // 2
    assert all(
        any(point[f"f{i}"] == 1.0 and point[f"f{j}"] == 1.0 for point in found) for i in range(14) for j in range(i)
    )


@given(seed=st.integers(0, 2**32), resample=st.floats(0, 1))
def test_points_stay_inside_the_space(seed: int, resample: float) -> None:
    space = Space(
        {
            "child": DimensionSpec(uniform=(2, 10), step=4, when={"kind": ("b",)}),
            "kind": DimensionSpec(choice=("a", "b", "c")),
            "rate": DimensionSpec(loguniform=(1e-6, 1e-2)),
            "betas": DimensionSpec(choice=([0.0, 0.9], [0.5, 0.999])),
            "whole": DimensionSpec(loguniform=(1, 1000)),
        }
    )
    rng = Random(seed)
    point = space.draw(rng)
    for _ in range(5):
        assert space.holds(point)
        assert ("child" in point) == (point["kind"] == "b")
        if "child" in point:
            assert point["child"] in (2, 6, 10)
        assert isinstance(point["whole"], int)
        point = space.perturb(point, rng, resample)


def test_loguniform_draws_every_order_of_magnitude_equally_often() -> None:
    space = Space({"rate": DimensionSpec(loguniform=(1e-6, 1e-2))})
    rng = Random(0)
    logs = [math.log10(space.draw(rng)["rate"]) for _ in range(4000)]
    counts = [sum(low <= value < low + 1 for value in logs) for low in range(-6, -2)]
    # 1000 each, binomial with standard deviation 27
    assert all(abs(count - 1000) < 5 * 27.4 for count in counts)


def test_a_perturbation_is_a_fifth_up_or_down() -> None:
    space = Space({"rate": DimensionSpec(loguniform=(1e-6, 1.0))})
    found = {round(space.perturb({"rate": 1e-3}, Random(seed), 0.0)["rate"], 9) for seed in range(20)}
    assert found == {0.0008, 0.0012}


def test_the_trial_job_has_the_point(tmp_path: Path) -> None:
    search = load_search(write(tmp_path, SEARCH))
    base = load_base(search, tmp_path)
    job = trial_job(base, {"training.optimizers.generator.lr": 3e-4}, seed=7, evaluation__samples=400)
    assert job.training.optimizers["generator"].lr == 3e-4
    assert (job.seed, job.evaluation.samples) == (7, 400)
    assert base.training.optimizers == {}


def test_every_search_file_is_legal_at_every_corner() -> None:
    found = sorted((ROOT / "jobs" / "searches").glob("*.yaml"))
    assert found
    for path in found:
        search = load_search(path)
        check_corners(search, load_base(search, path.parent))


def test_upload_has_no_use_in_a_search(tmp_path: Path) -> None:
    job = {**JOB, "checkpoint": {"upload": "s3://bucket/runs"}}
    search = load_search(write(tmp_path, SEARCH, job))
    with pytest.raises(SpecError, match=r"checkpoint.upload: null"):
        load_base(search, tmp_path)
    allowed = load_search(write(tmp_path, {**SEARCH, "set": {"checkpoint.upload": None}}, job))
    assert load_base(allowed, tmp_path).checkpoint.upload is None


def test_rules_hold_however_a_search_is_made() -> None:
    with pytest.raises(ValueError, match="give exactly one of"):
        SearchSpec.model_validate(changed(space={"ema.half_life_kimg": {"uniform": [1, 2], "choice": [1]}}))
