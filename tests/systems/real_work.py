"""What workers do with every system: a few iterations under the real trainer and engines."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.systems.tiny import random_batch, tiny_arguments, tiny_system
from tests.training.forked import start_group, wait_for_group
from torch import Tensor

from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, System
from bessemer.systems.registry import all_systems
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer, owned_slices

__all__ = [
    "FLAGSHIPS",
    "ITERATIONS",
    "State",
    "by_one_and_two",
    "of",
    "train_every_system",
    "train_flagships_in_double",
]

State = dict[str, Tensor]

BATCH, SLICE, ITERATIONS = 8, 4, 7
FLAGSHIPS = ("biggan", "biggan-deep", "stylegan2", "nvae")


class Stream:
    """Random images as a function of the clock and the slice."""

    def __init__(self, system: System, slices: list[int]) -> None:
        self.system, self.slices = system, slices

    def batch(self, nimg: int) -> list[Batch]:
        return [random_batch(self.system, SLICE, nimg, index) for index in self.slices]


def trainer_of(
    name: str, workers: Workers, folder: Path, optimizers: dict[str, Any], *, batch: int = BATCH, zero_stage: int = 1
) -> Trainer:
    """A trainer of the small system, at the start; one worker has nothing to shard."""
    system = tiny_system(name)
    job = JobSpec.model_validate(
        {
            "name": name,
            "seed": 3,
            "system": dict(zip(("name", "preset", "config"), tiny_arguments(name), strict=True)),
            "data": {"path": "."},
            "training": {
                "total_kimg": 1,
                "batch_size": batch,
                "slice_size": SLICE,
                "zero_stage": zero_stage if workers.size > 1 else 0,
                "optimizers": dict.fromkeys(system.networks(), optimizers) if optimizers else {},
            },
            "ema": {"half_life_kimg": 0.05, "rampup": None},
            "checkpoint": {"every_kimg": 1000, "background": False},
            "resources": {"workers": workers.size},
        }
    )
    updates = system.updates(system.stage_starts()[0])
    engines = build_engines(system.networks(), system.optimizers(), job.training, workers, updates)
    emas = {n: ShardedEma(engines[n], job.ema, workers) for n in system.sampled_networks}
    stream = Stream(system, owned_slices(job.slices, workers.rank, workers.size))
    store = CheckpointStore(folder, job.checkpoint, workers)
    identity = Identity(name, {}, job.seed, batch, SLICE, "")
    write, evaluate = (lambda *a, **k: None), (lambda clock, state: None)
    return Trainer(job, system, engines, emas, stream, store, identity, workers, write, evaluate)


def state_of(trainer: Trainer, prefix: str) -> dict[str, Tensor]:
    state = {f"ema.{k}": v.contiguous() for k, v in trainer.ema_state().items()}
    for key, network in trainer.system.networks().items():
        state |= {f"{key}.{k}": v.detach().clone().contiguous() for k, v in network.state_dict().items()}
    return {f"{prefix} {trainer.system.name} {k}": v for k, v in state.items()}


def by_one_and_two(work: Callable[[Path], None], folder: Path, seconds: float) -> dict[int, list[State]]:
    """Workers -> what each of them wrote; a group of one does `work`, and one of two."""
    found = {}
    for size in (1, 2):
        out = folder / f"of-{size}"
        log = out.with_suffix(".log")
        codes = wait_for_group(start_group(work, size, log, out), seconds)
        assert codes == [0] * size, log.read_text()
        found[size] = [load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(size)]
    return found


def of(state: State, run: str, name: str) -> State:
    """The part of what a worker wrote that is of one run of one system."""
    prefix = f"{run} {name} "
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def train_every_system(out: Path) -> None:
    """Train each system for `ITERATIONS`; stages change on the way.

    Written are the state at the `start`, and at the end of a run by plain gradient descent (`sgd`), in which rounding
    stays rounding. One worker also trains with the papers' optimizers, `straight` on and `resumed` in the middle.
    """
    state: dict[str, Tensor] = {}
    plain = {"name": "sgd", "lr": 1e-4, "momentum": 0.0}
    with join_workers() as workers:
        init_deepspeed(workers.device)
        for name in all_systems():
            trainer = trainer_of(name, workers, out.parent / f"{name}-sgd", plain)
            state |= state_of(trainer, "start")
            for _ in range(ITERATIONS):
                trainer._iteration()
            state |= state_of(trainer, "sgd")
            if workers.size > 1:
                continue
            folder, point = out.parent / name, random.Random(name).randrange(1, ITERATIONS)
            trainer = trainer_of(name, workers, folder, {})
            for iteration in range(ITERATIONS):
                if iteration == point:
                    trainer._save()
                    trainer.checkpoints.finish()
                trainer._iteration()
            state |= state_of(trainer, "straight")
            again = trainer_of(name, workers, folder, {})
            assert again.resume()
            while again.clock.iteration < ITERATIONS:
                again._iteration()
            state |= state_of(again, "resumed")
            assert again.system.state_dict() == trainer.system.state_dict()
        save_file(state, out.with_suffix(f".{workers.rank}.safetensors"))


def train_flagships_in_double(out: Path) -> None:
    """Three iterations of each flagship in float64 by its paper's optimizers, two slices a worker or four.

    Written are the state at the `start` and at the `end`.
    """
    from deepspeed.accelerator import get_accelerator

    torch.set_default_dtype(torch.float64)  # weights, buffers, images and all that is drawn
    dtypes = [*get_accelerator().supported_dtypes(), torch.float64]  # of gradients that DeepSpeed sums over workers
    get_accelerator().supported_dtypes = lambda: dtypes
    state: dict[str, Tensor] = {}
    with join_workers() as workers:
        init_deepspeed(workers.device)
        for name in FLAGSHIPS:
            # ZeRO's partitions are float32 whatever the weights are.
            trainer = trainer_of(name, workers, out.parent / name, {}, batch=4 * SLICE, zero_stage=0)
            for engine in trainer.engines.values():
                engine._engine.communication_data_type = torch.float64  # which its configuration cannot name
            state |= state_of(trainer, "start")
            for _ in range(3):
                trainer._iteration()
            state |= state_of(trainer, "end")
        save_file(state, out.with_suffix(f".{workers.rank}.safetensors"))
