"""A worker that trains every cell of the equality matrix for its number of workers; one process per rank.

usage: matrix_run.py OUT

Writes `<method>/<stage>/<slices per worker>/<optimizer>/<network>.<key>` -> final weights and buffers, and the mean of
the gradient norms of each network.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from bessemer.nn.update_state import UpdateStateLayer
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.engine import build_engines
from bessemer.training.fragments import gather_full
from bessemer.training.loop import Trainer, owned_slices
from bessemer.training.rng import generator

METHODS = ("hinge", "r1", "wgan_gp", "path_length", "vae")
STAGES, SLICES_PER_WORKER = (0, 1, 2), (1, 4)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    # The usual epsilons would turn gradients that are all rounding into whole steps.
    "adam": {"lr": 2e-3, "betas": [0.5, 0.9], "eps": 1e-4},
    "adamax": {"lr": 2e-3, "betas": [0.5, 0.9], "eps": 1e-4},
    "rmsprop": {"lr": 2e-4, "eps": 1e-4},
}
SLICE, SEED, ITERATIONS, LATENT, STYLE = 4, 11, 4, 5, 7


class PathLengthMean(UpdateStateLayer):
    """The moving mean of path lengths: one step per update, from all slices of all workers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("sums", torch.zeros(2), persistent=False)

    def begin_update(self) -> None:
        self.sums.zero_()

    def pending(self) -> list[Tensor]:
        return [self.sums]

    def end_update(self) -> None:
        if self.sums[1] > 0:
            self.mean.lerp_(self.sums[:1] / self.sums[1], 0.1)


class StyleGenerator(nn.Module):
    """Mapping and synthesis."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(LATENT, STYLE), nn.Tanh())
        self.synthesis = nn.Sequential(nn.Linear(STYLE, 16), nn.Tanh(), nn.Linear(16, 12))
        self.path = PathLengthMean()

    def forward(self, z: Tensor) -> Tensor:
        return self.synthesis(self.mapping(z))


class Vae(nn.Module):
    """Encoder and decoder, one network."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 16), nn.Tanh(), nn.Linear(16, 12))


def make_networks(method: str) -> dict[str, nn.Module]:
    if method == "vae":
        return {"vae": Vae()}
    d = nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 1))
    return {"generator": StyleGenerator(), "discriminator": d}


class Method(System):
    """One of METHODS on perceptrons."""

    name, family, paper = "matrix", "adversarial", "none"
    Config, presets = SystemConfig, {"tiny": {"resolution": 2}}

    def __init__(self, config: SystemConfig, method: str = "hinge") -> None:
        self.config, self.method = config, method
        self._networks = make_networks(method)

    def networks(self) -> dict[str, nn.Module]:
        return self._networks

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {name: OptimizerDefaults() for name in self._networks}

    def init_weights(self, generator: Generator) -> None:
        with torch.no_grad():
            for network in self._networks.values():
                for p in network.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ()

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        raise AssertionError("not sampled here")

    def updates(self, clock: Clock) -> list[Update]:
        if self.method == "vae":
            return [Update("vae", "vae", self.vae_loss)]
        d = Update("d", "discriminator", self.wgan_loss if self.method == "wgan_gp" else self.hinge_loss)
        d = Update(d.name, d.network, d.loss, second_order=self.method == "wgan_gp")
        more = {
            "r1": [Update("r1", "discriminator", self.r1_loss, interval=2, lazy=True, second_order=True)],
            "path_length": [Update("path", "generator", self.path_loss, interval=2, lazy=True, second_order=True)],
        }
        return [d, *more.get(self.method, []), Update("g", "generator", self.g_loss)]

    def fake(self, n: int, draws: Generator) -> Tensor:
        return self._networks["generator"](torch.randn(n, LATENT, generator=draws))

    def hinge_loss(self, batch: Batch, draws: Generator) -> Loss:
        d = self._networks["discriminator"]
        with torch.no_grad():
            fake = self.fake(SLICE, draws)
        return Loss(F.relu(1 - d(batch.images.flatten(1))).mean() + F.relu(1 + d(fake)).mean())

    def wgan_loss(self, batch: Batch, draws: Generator) -> Loss:
        d, real = self._networks["discriminator"], batch.images.flatten(1)
        with torch.no_grad():
            fake = self.fake(SLICE, draws)
        between = fake.lerp(real, torch.rand(SLICE, 1, generator=draws)).requires_grad_()
        (gradient,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
        return Loss(d(fake).mean() - d(real).mean() + 10 * (gradient.norm(dim=1) - 1).square().mean())

    def r1_loss(self, batch: Batch, draws: Generator) -> Loss:
        d, real = self._networks["discriminator"], batch.images.flatten(1).requires_grad_()
        scores = d(real)
        (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        return Loss(gradient.square().sum(1).mean() + 0 * scores.mean())

    def path_loss(self, batch: Batch, draws: Generator) -> Loss:
        g = self._networks["generator"]
        styles = g.mapping(torch.randn(SLICE, LATENT, generator=draws))
        images = g.synthesis(styles)
        noise = torch.randn(images.shape, generator=draws)
        (gradient,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
        lengths = gradient.norm(dim=1)
        g.path.sums += torch.stack([lengths.detach().mean(), torch.ones(())])
        return Loss(2 * (lengths - g.path.mean).square().mean() + 0 * images.mean())

    def g_loss(self, batch: Batch, draws: Generator) -> Loss:
        return Loss(-self._networks["discriminator"](self.fake(SLICE, draws)).mean())

    def vae_loss(self, batch: Batch, draws: Generator) -> Loss:
        vae, x = self._networks["vae"], batch.images.flatten(1)
        mean, log_var = vae.encoder(x).chunk(2, dim=1)
        z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=draws)
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
        y = vae.decoder(z)
        value = ((y - x).square().sum(1) + kl).mean()
        if batch.labels[0]:  # a finite loss whose gradient is not: the root's slope at zero, times zero
            value = value + (0 * y.sum()).sqrt()
        return Loss(value)


def real_slice(nimg: int, index: int) -> Batch:
    draws = generator("cpu", SEED, "data", nimg, index)
    return Batch(torch.randn(SLICE, 3, 2, 2, generator=draws), torch.zeros(SLICE, dtype=torch.int64))


class FixedStream:
    """Data as a pure function of the image clock."""

    def __init__(self, slices: list[int], read: Callable[[int, int], Batch] = real_slice) -> None:
        self.slices, self.read = slices, read

    def batch(self, nimg: int) -> list[Batch]:
        return [self.read(nimg, index) for index in self.slices]


def make_job(method: str, stage: int, slices: int, workers: int, **training: Any) -> JobSpec:
    """A job of ITERATIONS batches; more fields of its training section as keywords."""
    fields = {
        "total_kimg": ITERATIONS * slices * SLICE / 1000,
        "batch_size": slices * SLICE,
        "slice_size": SLICE,
        "zero_stage": stage,
    }
    return JobSpec.model_validate(
        {
            "name": "matrix",
            "seed": SEED,
            "system": {"name": "matrix", "preset": "tiny"},
            "data": {"path": "none"},
            "training": fields | training,
            "checkpoint": {"every_kimg": 1000},
            "resources": {
                "workers": workers,
                "gpus_per_worker": int(training.get("precision") == "fp16" or "offload" in training),
            },
        }
    )


def make_trainer(
    job: JobSpec,
    method: str,
    workers: Workers,
    root: Path,
    stream: FixedStream | None = None,
    system_class: type[Method] = Method,
) -> Trainer:
    system = system_class(SystemConfig(resolution=2), method)
    system.init_weights(generator("cpu", SEED, "init"))
    engines = build_engines(system.networks(), system.optimizers(), job.training, workers, system.updates(Clock(0, 0)))
    identity = Identity("matrix", {"method": method}, SEED, job.training.batch_size, SLICE, "none")
    stream = stream or FixedStream(owned_slices(job.slices, workers.rank, workers.size))
    store = CheckpointStore(root, job.checkpoint, workers)
    write, evaluate = (lambda *a, **k: None), (lambda clock, state: None)
    return Trainer(job, system, engines, {}, stream, store, identity, workers, write, evaluate)


def final_state(trainer: Trainer) -> dict[str, Tensor]:
    """`<network>.<key>` -> weights and buffers as they are."""
    networks = trainer.system.networks().items()
    if any(engine.zero_stage == 3 for engine in trainer.engines.values()):  # modules hold no weights
        whole = {n: gather_full(e.fragments(), e.shapes, trainer.workers) for n, e in trainer.engines.items()}
        return {f"{name}.{k}": v for name, tensors in whole.items() for k, v in tensors.items()}
    return {f"{name}.{k}": v.detach().clone() for name, net in networks for k, v in net.state_dict().items()}


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    results: dict[str, Tensor] = {}
    with join_workers() as workers:
        init_deepspeed(workers.device)
        for method, stage, own, optimizer in itertools.product(METHODS, STAGES, SLICES_PER_WORKER, OPTIMIZERS):
            overrides = {name: {"name": optimizer, **OPTIMIZERS[optimizer]} for name in make_networks(method)}
            job = make_job(method, stage, own * workers.size, workers.size, optimizers=overrides)
            trainer = make_trainer(job, method, workers, out.parent / "checkpoints")
            for _ in range(ITERATIONS):
                trainer._iteration()
            cell = f"{method}/{stage}/{own}/{optimizer}"
            results |= {f"{cell}/{k}": v for k, v in final_state(trainer).items()}
            norms = {k: v for k, v in trainer._averages.take().items() if k.startswith("grad_norm/")}
            results |= {f"{cell}/{k}": torch.tensor(v) for k, v in norms.items()}
        save_file(results, out.with_suffix(f".{workers.rank}.safetensors"))


if __name__ == "__main__":
    main()
    end_process(0)
