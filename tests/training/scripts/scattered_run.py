"""A real run of an autoencoder beside its plan, at ZeRO 3 or offloaded; the tests start one process per rank.

usage: scattered_run.py OUT WIDTH DEPTH SLICE_SIZE BATCH_SIZE BUCKET_ELEMENTS ZERO_STAGE OFFLOAD

The first worker writes to OUT what was planned and what was seen: the most bytes that PyTorch's CPU allocator had
handed out at once in an iteration, and the bytes of tensors that went through collectives in the last one.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from planned_run import make_trainer
from torch import Generator, Tensor, nn

from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update
from bessemer.training import engine, zero_costs
from bessemer.training.distributed import end_process, init_deepspeed, join_workers
from bessemer.training.plan import Target, make_plan

ITERATIONS = 4
moved = {"reduced": 0, "scattered": 0, "gathered": 0}


class Autoencoder(System):
    """Convolutions of one width between two that change the resolution."""

    name, family, paper = "autoencoder", "autoencoding", "none"
    Config, presets = SystemConfig, {"tiny": {"resolution": 32}}

    def __init__(self, config: SystemConfig, width: int, depth: int) -> None:
        self.config = config
        middle = [layer for _ in range(depth) for layer in (nn.Conv2d(width, width, 3, 1, 1), nn.Tanh())]
        ends = nn.Conv2d(3, width, 3, 2, 1), nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.network = nn.Sequential(ends[0], nn.Tanh(), *middle, ends[1])

    def networks(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.network}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"autoencoder": OptimizerDefaults()}

    def init_weights(self, generator: Generator) -> None:
        with torch.no_grad():
            for p in self.network.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("autoencoder",)

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        return self.network(torch.randn(len(labels), 3, 32, 32, generator=generator))

    def updates(self, clock: Clock) -> list[Update]:
        return [Update("reconstruction", "autoencoder", self.loss)]

    def loss(self, batch: Batch, draws: Generator) -> Loss:
        return Loss((self.network(batch.images) - batch.images).square().mean())


class _Done:
    """The handle of a collective that is over."""

    def wait(self, *_: object) -> bool:
        return True


def unseen(tensor: Tensor) -> Tensor:
    """A copy in memory that PyTorch's allocator knows nothing of: a thread of gloo lets go of what it sends when it
    likes, and the profiler sees nothing of that."""
    return torch.from_numpy(tensor.detach().contiguous().numpy().copy())


def through_unseen_memory() -> None:
    """Let the collectives that training uses send copies, and count what they move."""
    from deepspeed.comm import comm

    reduce = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> _Done:
        moved["reduced"] += tensor.nbytes
        copy = unseen(tensor)
        reduce(copy, op=op, group=group)
        tensor.copy_(copy)
        return _Done()

    def exchanging(call: Callable[..., Any], kind: str) -> Callable[..., _Done]:
        def exchange(output_tensor: Tensor, input_tensor: Tensor, async_op: bool = False, **more: Any) -> _Done:
            moved[kind] += max(output_tensor.nbytes, input_tensor.nbytes)
            copy = unseen(output_tensor)
            call(copy, unseen(input_tensor), **more)
            output_tensor.copy_(copy)
            return _Done()

        return exchange

    dist.all_reduce = all_reduce
    comm.cdb.all_gather_into_tensor = exchanging(comm.cdb.all_gather_into_tensor, "gathered")
    comm.cdb.reduce_scatter_tensor = exchanging(comm.cdb.reduce_scatter_tensor, "scattered")


def live_bytes() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def most_bytes(run: Callable[[], None]) -> int:
    """The most that lived at once while `run` ran."""
    before = live_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    live = most = before
    for _, change in events:
        live += change
        most = max(most, live)
    return most


def main() -> None:
    width, depth, slice_size, batch_size, bucket, stage = map(int, sys.argv[2:8])
    engine.BUCKET_ELEMENTS = zero_costs.BUCKET_ELEMENTS = bucket
    torch.set_num_threads(1)
    with join_workers() as workers:
        init_deepspeed(workers.device)
        training = {"total_kimg": 1, "batch_size": batch_size, "slice_size": slice_size, "zero_stage": stage}
        job = JobSpec.model_validate(
            {
                "name": "scattered",
                "system": {"name": "autoencoder", "preset": "tiny"},
                "data": {"path": "none"},
                "training": {**training, "offload": sys.argv[8]},
                "resources": {"workers": workers.size, "gpus_per_worker": 1},
            }
        )

        def build() -> System:
            return Autoencoder(SystemConfig(resolution=32), width, depth)

        plan = make_plan(job, build, Target("CPU", None, 1e9, True))
        through_unseen_memory()
        trainer = make_trainer(job, build(), workers)
        seen = []
        for _ in range(ITERATIONS):  # in the first two, DeepSpeed learns in which order the layers come
            moved.update(dict.fromkeys(moved, 0))
            seen.append(most_bytes(trainer._iteration))
        if workers.is_first:
            found = {"bytes": seen, **moved}
            Path(sys.argv[1]).write_text(json.dumps({"plan": plan.as_dict(), "seen": found}))


if __name__ == "__main__":
    main()
    end_process(0)
