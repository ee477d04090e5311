"""The plan agrees with real runs: memory, operations, what is sent."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from bessemer.errors import MachineError, SpecError
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import System
from bessemer.systems.registry import build
from bessemer.training.costs import slice_costs
from bessemer.training.plan import PARTS, Plan, Target, check_fits, make_plan, target

GIB = 1 << 30


RunPlanned = Callable[..., dict[str, Any]]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        # preset, width, slice, batch, ZeRO, weight of R1
        ("cifar10", 64, 4, 4, 0, 0),
        ("res32", 32, 16, 16, 1, 1),
        ("res32", 32, 16, 32, 2, 0),
    ],
    ids=lambda a: "-".join(map(str, a)),
)
def test_memory_and_operations_of_a_real_run(run_planned: RunPlanned, arguments: tuple[object, ...]) -> None:
    """All that PyTorch's allocator handed out in one process, against the plan without the evaluator's network."""
    found = run_planned(1, *arguments)
    plan, seen = found["plan"], found["seen"]
    planned = plan["total"] - plan["parts"]["sampler"]
    assert planned == pytest.approx(seen["bytes"], rel=0.10)
    for update in plan["updates"]:
        assert update["flops"] == seen["slices"] * seen["flops"][update["name"]] * update["steps"]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_sent_by_a_real_run(run_planned: RunPlanned, stage: int) -> None:
    """Two workers with two slices each: ZeRO 2 reduces twice. Up to padding and a few scalars."""
    found = run_planned(2, "res32", 16, 2, 8, stage, 0)
    seen = found["seen"]
    sent = (2 * seen["reduced"] + seen["gathered"]) / 2  # rings of two
    assert found["plan"]["sent"] == pytest.approx(sent, rel=1e-3)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        # width, depth, slice, batch, elements of a bucket, ZeRO, offload
        (128, 4, 8, 16, 1 << 24, 3, "none"),  # activations weigh more than weights
        (192, 5, 4, 8, 120_000, 3, "none"),  # weights do not fit into a bucket: most are gathered twice
        (192, 4, 2, 8, 1 << 24, 3, "optimizer"),
        (192, 4, 2, 8, 1 << 24, 2, "optimizer"),
        (192, 4, 4, 8, 1 << 24, 1, "optimizer"),
    ],
    ids=lambda a: "-".join(map(str, a)),
)
def test_memory_and_bytes_of_two_real_workers(run_planned: RunPlanned, arguments: tuple[object, ...]) -> None:
    found = run_planned(2, *arguments, script="scattered_run.py")
    plan, seen = found["plan"], found["seen"]
    planned = plan["total"] + plan["host"] - plan["parts"]["sampler"]
    assert planned == pytest.approx(min(seen["bytes"][2:]), rel=0.10)
    sent = (2 * seen["reduced"] + seen["gathered"] + seen["scattered"]) / 2  # rings of two
    assert plan["sent"] == pytest.approx(sent, rel=0.10)


def job(**changes: Any) -> JobSpec:
    training = {"total_kimg": 1000, "batch_size": 32, "slice_size": 8}
    return JobSpec.model_validate(
        {
            "name": "planned",
            "system": {"name": "biggan", "preset": "tiny32", "config": {"r1_gamma": 1.0, "d_steps": 2}},
            "data": {"path": "none"},
            "training": training | changes.pop("training", {}),
            **changes,
        }
    )


def planned(spec: JobSpec, memory: int | None = None, **options: Any) -> Plan:
    on = Target("a test's device", memory, 1e12, host=options.pop("host", False))
    return make_plan(spec, lambda: build("biggan", "tiny32", spec.system.config), on, **options)


def fit(spec: JobSpec, memory: int) -> None:
    check_fits(planned(spec, memory), spec, lambda changed: planned(changed, memory))


def test_parts_add_up_and_follow_the_stage() -> None:
    plans = {
        (stage, workers): planned(job(training={"zero_stage": stage, "batch_size": 64}, resources={"workers": workers}))
        for stage in (0, 1, 2)
        for workers in (1, 4)
    }
    networks = build("biggan", "tiny32").networks()
    weights = {name: 4 * sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    both, sampled = sum(weights.values()), weights["generator"]
    for (stage, workers), plan in plans.items():
        assert list(plan.parts) == list(PARTS)
        assert plan.total == sum(plan.parts.values())
        assert plan.parts["optimizer"] == pytest.approx(
            2 * both / (workers if stage else 1), rel=1e-3
        )  # Adam's moments
        assert plan.parts["ema"] == pytest.approx(sampled / workers, rel=1e-3)
        assert plan.parts["sampler"] == sampled
        copies = both + (both / workers if stage else 0)
        assert copies < plan.parts["weights"] < copies + 0.1 * both  # and the buffers
        assert (plan.sent == 0) == (workers == 1)
    assert plans[2, 4].total < plans[1, 4].total < plans[1, 1].total
    assert plans[0, 4].sent < plans[1, 4].sent


def test_an_iteration_counts_repeats_intervals_and_all_slices() -> None:
    spec = job()
    plan = planned(spec, efficiency=0.5)
    updates = {update.name: update for update in plan.updates}
    assert {name: update.steps for name, update in updates.items()} == {
        "discriminator": 2,
        "r1": 1 / 16,
        "generator": 1,
    }
    assert updates["r1"].second_order
    assert plan.flops == sum(update.flops for update in plan.updates)
    assert plan.images == 2 * 32
    once = planned(job(training={"batch_size": 8}))
    assert plan.flops == pytest.approx(4 * once.flops)
    assert plan.img_per_s == pytest.approx(64 * 0.5 * 1e12 / plan.flops)
    assert plan.hours == pytest.approx(1e6 / plan.img_per_s / 3600)
    assert planned(job(resources={"workers": 4}), efficiency=0.5).img_per_s == pytest.approx(4 * plan.img_per_s)


def test_time_goes_to_matrices_to_memory_or_to_launching() -> None:
    """By the counts of a slice: 4 slices on 2 workers, R1 once in 16 iterations, D twice."""
    spec = job(training={"precision": "bf16", "batch_size": 32}, resources={"workers": 2})

    def make() -> System:
        return build("biggan", "tiny32", spec.system.config)

    costs = {c.update.name: c for c in slice_costs(make, 8, accumulated=True, half=True)}
    steps = {"discriminator": 2, "r1": 1 / 16, "generator": 1}
    assert all(0 < c.half <= c.flops and c.moved > c.peak and c.kernels > 100 for c in costs.values())
    for launch, limit in ((0.0, "memory"), (1.0, "launching")):
        on = Target("x", None, 1e12, host=False, full_peak=1e11, bandwidth=1e9, launch=launch)
        plan = make_plan(spec, make, on, efficiency=0.5)
        for update in plan.updates:
            cost = costs[update.name]
            seconds = cost.half / 5e11 + (cost.flops - cost.half) / 5e10 + cost.moved / 8e8
            seconds = max(seconds, launch * cost.kernels)
            assert update.seconds == pytest.approx(2 * steps[update.name] * seconds)
            assert update.limit == limit
        assert plan.img_per_s == pytest.approx(64 / sum(update.seconds for update in plan.updates))
    assert {update.limit for update in planned(spec).updates} == {"matrices"}


def test_decoded_images_are_the_hosts() -> None:
    assert planned(job(), decoded_bytes=123, host=True).parts["data"] == 123
    assert planned(job(), decoded_bytes=123).parts["data"] == 0


def test_optimizers_say_what_they_keep() -> None:
    adam = planned(job()).parts["optimizer"]
    changed = {"optimizers": {n: {"name": "rmsprop"} for n in ("generator", "discriminator")}}
    assert planned(job(training=changed)).parts["optimizer"] == adam // 2


def test_what_cannot_fit_is_refused_with_a_slice_size_that_fits() -> None:
    spec = job(training={"batch_size": 32, "slice_size": 32})
    most = planned(spec).total
    fit(spec, most)
    with pytest.raises(
        MachineError, match=r"memory: .*activations of update .*Set training\.slice_size to 16 \(now 32"
    ):
        fit(spec, int(0.7 * most))
    smaller = job(training={"batch_size": 32, "slice_size": 16})
    fit(smaller, int(0.7 * most))
    with pytest.raises(MachineError, match=r"Set training\.slice_size to 8"):  # 16 would still be too much
        fit(spec, int(0.6 * most))


def test_an_evaluation_can_need_the_most() -> None:
    training = planned(job(training={"slice_size": 1}), extractors=GIB, evaluation=1000)
    assert training.worst in ("discriminator", "generator")
    assert training.parts["extractors"] == GIB
    judged = planned(job(training={"slice_size": 1}), extractors=GIB, evaluation=2 * GIB)
    assert (judged.worst, judged.parts["activations"], judged.parts["gradients"]) == ("evaluation", 2 * GIB, 0)
    moment = sum(training.parts[name] for name in ("gradients", "reduction", "activations"))
    assert judged.total == training.total - moment + 2 * GIB
    with pytest.raises(MachineError, match=r"activations of the evaluation with 2 GiB\. Set evaluation\.batch_size"):
        check_fits(planned(job(), GIB, extractors=1, evaluation=2 * GIB), job(), lambda changed: judged)


def test_what_weights_alone_exceed_is_sharded_first() -> None:
    for stage, advice in ((0, r"zero_stage to 2 and resources\.workers"), (2, r"resources\.workers to more than 1")):
        spec = job(training={"zero_stage": stage, "slice_size": 1})
        with pytest.raises(MachineError, match=advice):
            fit(spec, 1 << 20)


def test_targets() -> None:
    assert target("h100", job()).memory == 78 * GIB
    cpu = target("cpu", job())
    assert cpu.host
    assert cpu.memory is None or cpu.memory >= 0
    with pytest.raises(SpecError, match=r"--device: there is no device named 'h300'; known: h200"):
        target("h300", job())
    with pytest.raises(SpecError, match=r"training\.precision: bf16 has no hardware on NVIDIA V100"):
        target("v100", job(training={"precision": "bf16"}))


def test_any_system_can_be_planned(tiny: ModuleType) -> None:
    spec = job(training={"batch_size": 16, "slice_size": 4})
    plan = make_plan(spec, lambda: tiny.TinyGan(tiny.SystemConfig(resolution=2)), Target("x", None, 1e9, host=True))
    assert [u.name for u in plan.updates] == ["discriminator", "r1", "generator"]
