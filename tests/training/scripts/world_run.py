"""A worker that trains a small BigGAN for a few steps on packed digits; one process per rank.

usage: world_run.py OUT DATA [--steps STEPS]

Everything is real: the system, the data set, the stream, the
engines. Each writes `<network>.<key>` -> weights and buffers, the averages under `ema.`, the initial weights under
`start.`, and `samples`, drawn from the averages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.stream import SliceStream
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer, owned_slices
from bessemer.training.rng import generator

BATCH, SLICE = 16, 4
CONFIG = {
    "generator_width": 4,
    "discriminator_width": 4,
    "latent_dim": 20,
    "shared_dim": 8,
    "r1_gamma": 0.1,
    "r1_interval": 4,
    # Adam at the preset's epsilon divides rounding by itself (biases before batch normalisation have no gradient but
    # rounding), and at its rate the two networks drive each other so hard that after fifty steps the weights of one
    # worker alone differ by 3e-3 if it takes its slices in another order. These settings let rounding stay rounding.
    "generator_lr": 2e-5,
    "discriminator_lr": 2e-5,
    "adam_eps": 1e-4,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("data", help="directory or URL")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    name, steps = "biggan", options.steps
    torch.set_num_threads(1)
    with join_workers() as workers, ShardedDataset.open(options.data) as dataset:
        init_deepspeed(workers.device)
        job = JobSpec.model_validate(
            {
                "name": "world",
                "seed": 3,
                "system": {"name": name, "preset": "tiny32", "config": CONFIG},
                "data": {"path": str(options.data)},
                "training": {
                    "total_kimg": steps * BATCH / 1000,
                    "batch_size": BATCH,
                    "slice_size": SLICE,
                    "zero_stage": {1: 0, 2: 1, 4: 2}[workers.size],
                },
                "ema": {"half_life_kimg": 0.2, "rampup": None},
                "checkpoint": {"every_kimg": 1000},
                "resources": {"workers": workers.size},
            }
        )
        system = build(name, "tiny32", CONFIG, dataset.manifest.facts)
        system.init_weights(generator("cpu", job.seed, "init"))
        start = {
            f"start.{network}.{k}": p.detach().clone()
            for network, net in system.networks().items()
            for k, p in net.named_parameters()
        }
        updates = system.updates(Clock(0, 0))
        engines = build_engines(system.networks(), system.optimizers(), job.training, workers, updates)
        emas = {"generator": ShardedEma(engines["generator"], job.ema, workers)}
        slices = owned_slices(job.slices, workers.rank, workers.size)
        stream = SliceStream(dataset, seed=job.seed, batch_size=BATCH, slice_size=SLICE, slices=slices)
        identity = Identity(name, {}, job.seed, BATCH, SLICE, dataset.manifest.hash)
        store = CheckpointStore(options.out.parent / "checkpoints", job.checkpoint, workers)
        write, evaluate = (lambda *a, **k: None), (lambda clock, state: None)
        trainer = Trainer(job, system, engines, emas, stream, store, identity, workers, write, evaluate)
        try:
            while trainer.clock.iteration < steps:
                trainer._iteration()
        finally:
            stream.close()
        averages = trainer.ema_state()
        state = start | {f"ema.{k}": v.contiguous() for k, v in averages.items()}
        for key, network in system.networks().items():
            state |= {f"{key}.{k}": v.detach().clone() for k, v in network.state_dict().items()}
        system.networks()["generator"].load_state_dict({k.removeprefix("generator."): v for k, v in averages.items()})
        system.networks()["generator"].eval()
        state["samples"] = system.sample(torch.arange(10), generator("cpu", job.seed, "samples"))
        save_file(state, options.out.with_suffix(f".{workers.rank}.safetensors"))


if __name__ == "__main__":
    main()
    end_process(0)
