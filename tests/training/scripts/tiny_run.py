"""A worker of a tiny adversarial run with R1 and accumulation; the tests start one process per rank.

usage: tiny_run.py OUT ZERO_STAGE ITERATIONS [--run DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from bessemer.nn.update_state import UpdateStateLayer
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update
from bessemer.systems.snapshot import SnapshotInfo
from bessemer.tracking.journal import Journal
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.ema_store import EmaStore
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer, owned_slices
from bessemer.training.rng import generator

BATCH, SLICE, GAMMA, SEED = 16, 4, 2.0, 7


class Normed(UpdateStateLayer):
    """Batch norm whose running mean moves once per update: state that must not depend on the workers.

    And a counter that moves as an update begins, as spectral-norm vectors do.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("updates", torch.zeros(1))
        self.register_buffer("sums", torch.zeros(features + 1), persistent=False)

    def begin_update(self) -> None:
        self.updates += 1
        self.sums.zero_()

    def pending(self) -> list[Tensor]:
        return [self.sums]

    def end_update(self) -> None:
        if self.sums[-1] > 0:
            self.mean.lerp_(self.sums[:-1] / self.sums[-1], 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.sums += torch.cat([x.detach().mean(0), torch.ones(1)])
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def make_networks() -> tuple[nn.Module, nn.Module]:
    # No bias before the norm: its gradient is rounding noise, which Adam would blow up.
    g = nn.Sequential(nn.Linear(5, 16, bias=False), Normed(16), nn.Tanh(), nn.Linear(16, 12))
    d = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 1))
    return g, d


class TinyGan(System):
    """Two small perceptrons, non-saturating loss, R1 every second iteration, two discriminator steps."""

    name, family, paper = "tiny-gan", "adversarial", "none"
    Config, presets = SystemConfig, {"tiny": {"resolution": 2}}

    def __init__(self, config: SystemConfig) -> None:
        self.config = config
        self.generator, self.discriminator = make_networks()

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {
            "generator": OptimizerDefaults(lr=1e-3, betas=(0.0, 0.9)),
            "discriminator": OptimizerDefaults(lr=3e-3, betas=(0.5, 0.99)),
        }

    def init_weights(self, generator: Generator) -> None:
        with torch.no_grad():
            for network in self.networks().values():
                for p in network.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        return self.generator(torch.randn(len(labels), 5, generator=generator)).view(-1, 3, 2, 2)

    def updates(self, clock: Clock) -> list[Update]:
        return [
            Update("discriminator", "discriminator", self.d_loss, repeats=2),
            Update("r1", "discriminator", self.r1_loss, interval=2, second_order=True),
            Update("generator", "generator", self.g_loss),
        ]

    def d_loss(self, batch: Batch, draws: Generator) -> Loss:
        with torch.no_grad():
            fake = self.generator(torch.randn(len(batch.images), 5, generator=draws))
        real = self.discriminator(batch.images.flatten(1))
        return Loss(F.softplus(-real).mean() + F.softplus(self.discriminator(fake)).mean())

    def r1_loss(self, batch: Batch, draws: Generator) -> Loss:
        images = batch.images.flatten(1).requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(images).sum(), images, create_graph=True)
        # scores at weight 0: parameters that R1 does not reach (the last bias) still take part
        return Loss(GAMMA / 2 * gradient.square().sum(1).mean() + 0 * self.discriminator(images).mean())

    def g_loss(self, batch: Batch, draws: Generator) -> Loss:
        fake = self.generator(torch.randn(len(batch.images), 5, generator=draws))
        return Loss(F.softplus(-self.discriminator(fake)).mean())


def real_slice(nimg: int, index: int) -> Batch:
    draws = generator("cpu", SEED, "data", nimg, index)
    return Batch(torch.randn(SLICE, 3, 2, 2, generator=draws), torch.zeros(SLICE, dtype=torch.int64))


class FixedStream:
    """Data as a pure function of the image clock."""

    def __init__(self, slices: list[int]) -> None:
        self.slices = slices

    def batch(self, nimg: int) -> list[Batch]:
        return [real_slice(nimg, index) for index in self.slices]


def make_job(stage: int, iterations: int, workers: int, clip: float | None = None) -> JobSpec:
    training = {
        "total_kimg": iterations * 2 * BATCH / 1000,
        "batch_size": BATCH,
        "slice_size": SLICE,
        "zero_stage": stage,
        "gradient_clipping": clip,
    }
    return JobSpec.model_validate(
        {
            "name": "tiny",
            "seed": SEED,
            "system": {"name": "tiny-gan", "preset": "tiny"},
            "data": {"path": "none"},
            "training": training,
            "ema": {"half_life_kimg": 0.2, "rampup": 0.5, "profiles": [0.1, 0.25], "store_every_kimg": 0.064},
            "checkpoint": {"every_kimg": 4 * 2 * BATCH / 1000, "keep_last": 100},
            "resources": {"workers": workers},
        }
    )


def make_trainer(job: JobSpec, root: Path, workers: Workers, kind: type[TinyGan] = TinyGan) -> Trainer:
    system = kind(SystemConfig(resolution=2))
    system.init_weights(generator("cpu", SEED, "init"))
    engines = build_engines(system.networks(), system.optimizers(), job.training, workers)
    emas = {"generator": ShardedEma(engines["generator"], job.ema, workers)}
    identity = Identity("tiny-gan", {"resolution": 2}, SEED, BATCH, SLICE, "none")
    stream = FixedStream(owned_slices(job.slices, workers.rank, workers.size))
    store = CheckpointStore(root / "checkpoints", job.checkpoint, workers)
    root.mkdir(parents=True, exist_ok=True)
    write = Journal(root / "journal.jsonl").write if workers.is_first else (lambda *a, **k: None)
    info = SnapshotInfo("tiny-gan", {"resolution": 2}, 0, {}, SEED, "none", [], [])
    profiles = EmaStore(root / "ema", job.ema.profiles, info, workers)

    def ignore(*_: object) -> None:
        pass

    return Trainer(job, system, engines, emas, stream, store, identity, workers, write, ignore, profiles)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", type=int)
    parser.add_argument("iterations", type=int)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--clip", type=float)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with join_workers() as workers:
        init_deepspeed(workers.device)
        job = make_job(options.stage, options.iterations, workers.size, options.clip)
        trainer = make_trainer(job, options.run or options.out.parent / options.out.stem, workers)
        trainer.resume()
        trainer.run()
        state = {f"ema.{k}": v for k, v in trainer.ema_state().items()}
        for kind in ("ema.0.1", "ema.0.25"):
            state |= {f"{kind}.generator.{k}": v for k, v in trainer.emas["generator"].full_state(kind).items()}
        for name, network in trainer.system.networks().items():
            state |= {f"{name}.{k}": v.detach().clone() for k, v in network.state_dict().items()}
        for name, engine in trainer.engines.items():  # moments: this worker's own share
            for key, fragments in engine.state_fragments().items():
                state |= {f"{name}.{key}.{f.name}.{f.start}": f.data.clone() for f in fragments if f.data.numel()}
        save_file(state, options.out.with_suffix(f".{workers.rank}.safetensors"))


if __name__ == "__main__":
    main()
    end_process(0)
