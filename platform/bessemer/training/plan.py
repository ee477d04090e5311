"""The plan of a job: memory of a worker by part, what it sends, operations, and the speed to expect.

Memory is that of tensors. Workspaces of cuDNN, the allocator's gaps and, on the CPU, Python and its libraries come on
top of it, and in the host's memory a copy of the state while a checkpoint is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bessemer.errors import MachineError, SpecError
from bessemer.nn.update_state import UpdateStateLayer
from bessemer.spec.job import JobSpec, OptimizerSpec
from bessemer.systems.contract import OptimizerDefaults, System
from bessemer.training.costs import SliceCost, slice_costs
from bessemer.training.devices import DEVICES, copy_speed, matmul_peak
from bessemer.training.machine import available_memory
from bessemer.training.optimizers import build_optimizer
from bessemer.training.zero_costs import Sharding, network_sizes

__all__ = ["PARTS", "Plan", "Target", "UpdatePlan", "check_fits", "make_plan", "target"]

PARTS = (
    *("weights", "optimizer", "ema", "sampler", "extractors", "data"),
    *("gradients", "reduction", "gathered", "activations"),
)
"""Parts of a worker's memory. `sampler` is the averaged network that is evaluated, `data` the decoded images that a
CPU keeps; `reduction` holds what is exchanged, `gathered` the whole weights that ZeRO 3 has for a while; `gradients`,
`reduction`, `gathered` and `activations` are of the worst moment."""

EVALUATION = "evaluation"
"""What :attr:`Plan.worst` says when no update needs the most."""

_BANDWIDTH = 0.8
"""Share of the memory's bandwidth that passes over tensors reach."""

_LAUNCH = 1e-5
"""Seconds that Python and PyTorch take to hand one operation to the device."""

_PROCESS = 700 << 20
"""Bytes of a process that has loaded Python, torch and DeepSpeed and done nothing yet."""


@dataclass(frozen=True)
class Target:
    """What a worker runs on."""

    name: str
    memory: int | None
    """Bytes that a worker may take; None where we do not know."""
    peak: float
    """FLOP/s at most, in the job's precision."""
    host: bool
    """Whether it is the CPU."""
    full_peak: float | None = None
    """FLOP/s of what stays in fp32; `peak` when unset."""
    bandwidth: float = math.inf
    """Bytes/s of its memory."""
    launch: float = 0.0
    """Seconds per operation before the device can begin with it."""


def target(key: str, job: JobSpec) -> Target:
    """A worker's share of `cpu`, which is this machine as it is now, or a GPU of :data:`DEVICES`.

    Raises:
        SpecError: there is no such device, or it lacks the job's precision.
    """
    precision = job.training.precision
    if key == "cpu":
        free = available_memory()
        share = None if free is None else max(0, free // job.resources.workers - _PROCESS)
        full = matmul_peak(torch.float32)
        peak = matmul_peak(torch.bfloat16) if precision == "bf16" else full
        return Target("the CPU", share, peak, True, full, copy_speed(), _LAUNCH)
    if key not in DEVICES:
        raise SpecError(f"--device: there is no device named {key!r}; known: {', '.join([*DEVICES, 'cpu'])}.")
    device = DEVICES[key]
    if precision not in device.peaks:
        raise SpecError(
            f"training.precision: {precision} has no hardware on {device.name}; set it to fp32, or choose another "
            "--device."
        )
    peaks = device.peaks
    return Target(device.name, device.memory, peaks[precision], False, peaks["fp32"], device.bandwidth, _LAUNCH)


@dataclass(frozen=True)
class UpdatePlan:
    """One update of an iteration, as one worker sees it."""

    name: str
    network: str
    steps: float
    """Optimizer steps per iteration: repeats / interval."""
    second_order: bool
    flops: float
    """Operations per iteration, of all workers."""
    seconds: float
    """Of an iteration, on each worker."""
    limit: str
    """What most of them go to: `matrices`, `memory`, or `launching` the kernels."""
    memory: int
    """Bytes beyond what always lives, at the worst moment of this update."""
    sent: float
    """Bytes that a worker sends per iteration, with rings: 2(W-1)/W of what is reduced, (W-1)/W of what is gathered."""


@dataclass(frozen=True)
class Plan:
    """What a job takes and gives."""

    job: str
    device: str
    workers: int
    zero_stage: int
    precision: str
    parts: Mapping[str, int]
    """Part of :data:`PARTS` -> bytes per worker."""
    total: int
    """Bytes per worker."""
    memory: int | None
    """Bytes that a worker may take."""
    host: int
    """Bytes per worker in the host's memory for what is offloaded."""
    updates: Sequence[UpdatePlan]
    worst: str
    """Update that needs the most, or :data:`EVALUATION`."""
    evaluation: int
    """Bytes beyond what always lives, at the worst moment of an evaluation."""
    flops: float
    """Operations per iteration, of all workers."""
    sent: float
    """Bytes that a worker sends per iteration."""
    images: int
    """Real images per iteration."""
    peak: float
    """FLOP/s of one device at most."""
    efficiency: float
    """Share of the peak that is assumed for matrix work."""
    img_per_s: float
    hours: float
    """To training.total_kimg, without evaluations."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_plan(
    job: JobSpec,
    build: Callable[[], System],
    on: Target,
    *,
    efficiency: float = 0.35,
    decoded_bytes: int = 0,
    extractors: int = 0,
    evaluation: int = 0,
) -> Plan:
    """Plan a job.

    The speed is that of a device that multiplies dense matrices at a share of its peak, reads and writes everything
    else at a share of its memory's bandwidth (after Williams, Waterman and Patterson 2009, Roofline), and waits where
    its kernels are launched more slowly than it runs them. What `training.compile` fuses is not taken into account.

    Args:
        job: its number of workers is planned for.
        build: makes the job's system; called where tensors have no values.
        on: the device of each worker.
        efficiency: share of the device's peak to assume for matrix work.
        decoded_bytes: of decoded images that each worker keeps in host memory.
        extractors: bytes of the feature extractors.
        evaluation: most bytes at once of drawing and judging, beyond weights.
    """
    training, workers, stage = job.training, job.resources.workers, job.training.zero_stage
    slices = job.slices // workers
    costs = slice_costs(
        build,
        training.slice_size,
        accumulated=slices > 1 and stage < 3,
        half=training.precision != "fp32",
        released=stage == 3,
    )
    with torch.device("meta"):
        system = build()
    networks = system.networks()
    offloads = training.offload == "optimizer"
    sizes = {name: network_sizes(network, stage, workers) for name, network in networks.items()}
    sharding = Sharding(stage, workers, slices, offloads, sizes)
    state = sum(b.nbytes for network in networks.values() for b in network.buffers())
    optimizers = system.optimizers()
    moments_of = {n: _moments(n, optimizers[n], training.optimizers.get(n, OptimizerSpec())) for n in networks}
    optimizer = sum(sharding.owned(n) * moments_of[n] for n in networks)
    averages = sum(sizes[n].shard for n in system.sampled_networks) * (1 + len(job.ema.profiles))
    always = {
        "weights": state + sharding.weights(),
        "optimizer": 0 if offloads else optimizer,
        "ema": 0 if offloads else averages,
        "sampler": sum(sizes[n].whole for n in system.sampled_networks),
        "extractors": extractors,
        "data": decoded_bytes if on.host else 0,
    }
    moments = [sharding.worst_moment(cost) for cost in costs]
    pending = _pending_bytes(networks)
    updates = [
        UpdatePlan(
            name=cost.update.name,
            network=cost.update.network,
            steps=cost.update.repeats / cost.update.interval,
            second_order=cost.update.second_order,
            flops=job.slices * cost.flops * cost.update.repeats / cost.update.interval,
            seconds=slices * sum(spent.values()) * cost.update.repeats / cost.update.interval,
            limit=max(spent, key=lambda part: spent[part]),
            memory=sum(moment.values()),
            sent=sharding.sent(cost, pending) * cost.update.repeats / cost.update.interval,
        )
        for cost, moment, spent in zip(costs, moments, (_spent(c, on, efficiency) for c in costs), strict=True)
    ]
    by_name = {update.name: moment for update, moment in zip(updates, moments, strict=True)}
    by_name[EVALUATION] = {**sharding.between_steps(), "gathered": 0, "activations": evaluation}
    needs = {name: sum(moment.values()) for name, moment in by_name.items()}
    worst = max(needs, key=lambda name: needs[name])
    parts = {**always, **by_name[worst]}
    images = training.batch_size * max(cost.update.repeats for cost in costs)
    flops = sum(u.flops for u in updates)
    img_per_s = images / sum(u.seconds for u in updates)
    return Plan(
        job=job.name,
        device=on.name,
        workers=workers,
        zero_stage=stage,
        precision=training.precision,
        parts={name: parts[name] for name in PARTS},
        total=sum(parts.values()),
        memory=on.memory,
        host=sharding.host(optimizer, averages),
        updates=updates,
        worst=worst,
        evaluation=needs[EVALUATION],
        flops=flops,
        sent=sum(u.sent for u in updates),
        images=images,
        peak=on.peak,
        efficiency=efficiency,
        img_per_s=img_per_s,
        hours=training.total_kimg * 1000 / img_per_s / 3600,
    )


def _spent(cost: SliceCost, on: Target, efficiency: float) -> dict[str, float]:
    """Seconds of one slice by what they go to."""
    matrices = (cost.half / on.peak + (cost.flops - cost.half) / (on.full_peak or on.peak)) / efficiency
    memory = cost.moved / (_BANDWIDTH * on.bandwidth)
    # Launching runs beside the device's work: only what goes beyond it is waited for.
    return {
        "matrices": matrices,
        "memory": memory,
        "launching": max(0.0, cost.kernels * on.launch - matrices - memory),
    }


def _moments(network: str, base: OptimizerDefaults, own: OptimizerSpec) -> int:
    """Numbers per weight that the optimizer keeps; asked of the optimizer itself."""
    probe = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(network, probe, base, own)
    probe.weight.grad = torch.zeros_like(probe.weight)
    optimizer.step()
    return sum(torch.is_tensor(v) and v.shape == probe.weight.shape for v in optimizer.state[probe.weight].values())


def _pending_bytes(networks: Mapping[str, nn.Module]) -> int:
    """Bytes of per-update state (BatchNorm statistics) that are summed over the workers in each update."""
    layers = [m for network in networks.values() for m in network.modules() if isinstance(m, UpdateStateLayer)]
    return sum(t.nbytes for layer in layers for t in layer.pending())


def check_fits(plan: Plan, job: JobSpec, replan: Callable[[JobSpec], Plan]) -> None:
    """Refuse a plan that its device cannot hold.

    Args:
        plan: of the job.
        job: what was planned.
        replan: plans a changed job for the same device, to find advice that helps.

    Raises:
        MachineError: names the largest part and the field to change.
    """
    if plan.memory is None or plan.total <= plan.memory:
        return
    part = max(plan.parts, key=lambda name: plan.parts[name])
    moment = "the evaluation" if plan.worst == EVALUATION else f"update {plan.worst}"
    where = f" of {moment}" if part == "activations" else ""
    raise MachineError(
        f"memory: a worker needs {_gib(plan.total)} GiB, and {plan.device} has {_gib(plan.memory)} GiB for it; the "
        f"largest part is {part}{where} with {_gib(plan.parts[part])} GiB. {_advice(plan, job, part, replan)}"
    )


def _advice(plan: Plan, job: JobSpec, part: str, replan: Callable[[JobSpec], Plan]) -> str:
    assert plan.memory is not None
    training = job.training
    if part == "activations" and plan.worst == EVALUATION:
        return "Set evaluation.batch_size lower, or evaluation.beside to true."
    if part == "activations":
        # Activations grow with the images of a slice, or a little slower, so larger slices need not be tried.
        most = int(training.slice_size * plan.memory / plan.parts[part])
        for size in range(min(most, training.slice_size - 1), 0, -1):
            if training.batch_size % (size * plan.workers) == 0:
                smaller = job.model_copy(update={"training": training.model_copy(update={"slice_size": size})})
                if replan(smaller).total <= plan.memory:
                    return f"Set training.slice_size to {size} (now {training.slice_size}; it changes the run)."
    if part == "data":
        return "Set data.cache to none."
    if training.zero_stage < 2:
        return f"Set training.zero_stage to 2 and resources.workers to more than {plan.workers}."
    return f"Set resources.workers to more than {plan.workers}, or take devices with more memory."


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.3g}"
