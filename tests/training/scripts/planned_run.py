"""A real run of a small BigGAN beside its plan; the tests start one process per rank.

usage: planned_run.py OUT PRESET WIDTH SLICE_SIZE BATCH_SIZE ZERO_STAGE R1_GAMMA

The first worker writes to OUT what was planned and what was seen: the most bytes that PyTorch's CPU allocator had
handed out at once, from before the networks were built to the end of the second iteration, and the bytes of tensors
that went through DeepSpeed's and our own collectives in the second iteration.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, System
from bessemer.systems.registry import build
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer
from bessemer.training.plan import Target, make_plan
from bessemer.training.rng import generator

exchanged = {"reduced": 0, "gathered": 0}


class Blank:
    """One black batch, made beforehand."""

    def __init__(self, slices: int, size: int) -> None:
        self.slices = [Batch(torch.zeros(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64))] * slices

    def batch(self, nimg: int) -> list[Batch]:
        return self.slices


def make_trainer(job: JobSpec, system: System, workers: Workers) -> Trainer:
    system.init_weights(generator("cpu", 0, "init"))
    engines = build_engines(system.networks(), system.optimizers(), job.training, workers, system.updates(Clock(0, 0)))
    emas = {name: ShardedEma(engines[name], job.ema, workers) for name in system.sampled_networks}
    stream = Blank(job.slices // workers.size, job.training.slice_size)
    identity = Identity(system.name, {}, 0, job.training.batch_size, job.training.slice_size, "none")
    store = CheckpointStore(Path(tempfile.mkdtemp()), job.checkpoint, workers)
    trainer = Trainer(
        job, system, engines, emas, stream, store, identity, workers, lambda *a, **k: None, lambda clock, state: None
    )
    for network in system.networks().values():
        network.train()
    return trainer


def counting(call: Callable[..., Any], kind: str, which: str) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        exchanged[kind] += options[which].nbytes if which in options else arguments[0].nbytes
        return call(*arguments, **options)

    return counted


def count_exchanges() -> None:
    from deepspeed.comm import comm

    dist.all_reduce = counting(dist.all_reduce, "reduced", "tensor")  # what DeepSpeed and Workers.sum call
    comm.cdb.all_gather_into_tensor = counting(comm.cdb.all_gather_into_tensor, "gathered", "output_tensor")


def main() -> None:
    out, preset = sys.argv[1:3]
    width, slice_size, batch_size, stage = map(int, sys.argv[3:7])
    config = {"generator_width": width, "discriminator_width": width, "d_steps": 1, "r1_gamma": float(sys.argv[7])}
    torch.set_num_threads(1)
    with join_workers() as workers:
        init_deepspeed(workers.device)
        if workers.size == 1:
            # A sum over one worker changes nothing; but a thread of gloo would let go of the tensor, where the profiler
            # does not see it.
            dist.all_reduce = lambda *arguments, **options: None
        job = JobSpec.model_validate(
            {
                "name": "planned",
                "system": {"name": "biggan", "preset": preset, "config": {**config, "r1_interval": 1}},
                "data": {"path": "none"},
                "training": {
                    "total_kimg": 1,
                    "batch_size": batch_size,
                    "slice_size": slice_size,
                    "zero_stage": stage,
                },
                "resources": {"workers": workers.size},
            }
        )
        plan = make_plan(job, lambda: build("biggan", preset, job.system.config), Target("CPU", None, 1e9, True))
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            trainer = make_trainer(job, build("biggan", preset, job.system.config), workers)
            trainer._iteration()
            count_exchanges()
            trainer._iteration()
        events = sorted(
            (event.start_ns(), event.nbytes())
            for event in profile.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        live = most = 0
        for _, change in events:
            live += change
            most = max(most, live)
        if workers.is_first:
            seen = {"bytes": most, "flops": trainer.meter.flops_per_slice, "slices": job.slices, **exchanged}
            Path(out).write_text(json.dumps({"plan": plan.as_dict(), "seen": seen}))


if __name__ == "__main__":
    main()
    end_process(0)
