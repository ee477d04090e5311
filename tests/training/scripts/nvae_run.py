"""A worker that trains a small NVAE on packed digits, regularised (ZeRO 0 or 1) and plain (ZeRO 0 or 3).

usage: nvae_run.py OUT DATA

Three sound steps each; the regularised run then meets a slice of NaN. Writes `<run>.<key>` -> weights and buffers after
the third step, `start of <run>.<key>` before the first, and `after nan.<key>` after the fourth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.stream import SliceStream
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock
from bessemer.systems.registry import build
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer, owned_slices
from bessemer.training.rng import generator

BATCH, SLICE = 8, 4
CONFIG = {
    "width": 4, "groups": [2, 1], "latent_channels": 2, "components": 2, "flows": 1, "kl_warmup_kimg": 0.02,
}  # fmt: skip


class Poisoned:
    """A stream whose fourth batch holds NaN, in its last slice, which is the last worker's."""

    def __init__(self, stream: SliceStream, last: bool) -> None:
        self.stream, self.last = stream, last

    def batch(self, nimg: int) -> list[Batch]:
        found = self.stream.batch(nimg)
        if nimg == 3 * BATCH and self.last:
            found[-1] = Batch(torch.full_like(found[-1].images, float("nan")), found[-1].labels)
        return found


def trainer_of(
    dataset: ShardedDataset, workers: Workers, stage: int, spectral: float, folder: Path
) -> tuple[Trainer, SliceStream]:
    config = {**CONFIG, "spectral": spectral}
    training = {"total_kimg": 0.032, "batch_size": BATCH, "slice_size": SLICE, "zero_stage": stage}
    # Gradients of nats are long, and at the paper's ε Adamax divides rounding by itself in its first steps.
    training["optimizers"] = {"vae": {"lr": 1e-3, "eps": 10.0}}
    job = JobSpec.model_validate(
        {
            "name": "nvae",
            "seed": 3,
            "system": {"name": "nvae", "preset": "tiny32", "config": config},
            "data": {"path": "."},
            "training": training,
            "ema": {"half_life_kimg": 0.2, "rampup": None},
            "checkpoint": {"every_kimg": 1000, "background": False},
            "resources": {"workers": workers.size},
        }
    )
    system = build("nvae", "tiny32", config, dataset.manifest.facts)
    system.init_weights(generator("cpu", job.seed, "init"))
    engines = build_engines(system.networks(), system.optimizers(), job.training, workers, system.updates(Clock(0, 0)))
    emas = {"vae": ShardedEma(engines["vae"], job.ema, workers)}
    slices = owned_slices(job.slices, workers.rank, workers.size)
    stream = SliceStream(dataset, seed=job.seed, batch_size=BATCH, slice_size=SLICE, slices=slices)
    store = CheckpointStore(folder, job.checkpoint, workers)
    identity = Identity("nvae", {}, job.seed, BATCH, SLICE, dataset.manifest.hash)
    poisoned = Poisoned(stream, workers.rank == workers.size - 1)
    write, evaluate = (lambda *a, **k: None), (lambda clock, state: None)
    return Trainer(job, system, engines, emas, poisoned, store, identity, workers, write, evaluate), stream


def state_of(trainer: Trainer, prefix: str) -> dict[str, Tensor]:
    """Weights from the fp32 fragments, whole on every worker, and buffers."""
    engine = trainer.engines["vae"]
    state = {k: v.detach().clone() for k, v in engine.buffers().items()}
    whole = {k: torch.zeros(shape.numel()) for k, shape in engine.shapes.items()}
    for fragment in engine.fragments():
        whole[fragment.name][fragment.start : fragment.start + fragment.data.numel()] = fragment.data
    for key, flat in whole.items():
        state[key] = trainer.workers.sum(flat).view(engine.shapes[key])
    return {f"{prefix}.{k}": v for k, v in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state: dict[str, Tensor] = {}
    with join_workers() as workers, ShardedDataset.open(options.data) as dataset:
        init_deepspeed(workers.device)
        for name, spectral, stage in (("regularised", 0.1, 1), ("plain", 0.0, 3)):
            folder = options.out.parent / name
            trainer, stream = trainer_of(dataset, workers, stage if workers.size > 1 else 0, spectral, folder)
            state |= state_of(trainer, f"start of {name}")
            for _ in range(3):
                trainer._iteration()
            state |= state_of(trainer, name)
            if spectral:
                trainer._iteration()
                assert trainer.engines["vae"].skipped_steps == 1
                state |= state_of(trainer, "after nan")
            stream.close()
        save_file(state, options.out.with_suffix(f".{workers.rank}.safetensors"))


if __name__ == "__main__":
    main()
    end_process(0)
