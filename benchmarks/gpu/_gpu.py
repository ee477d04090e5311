"""What the benchmarks for GPUs share: their command line, a loop of updates on one device, and clocks that wait for it.

Each is ``torchrun --standalone --nproc-per-node 1 benchmarks/gpu/NAME.py [--quick] [--out FILE]`` or plain ``python``,
and needs torch and DeepSpeed, not Ray or MLflow. Where there is no GPU it says so at once and exits with 2.
``--device cpu`` runs it anyway, with tiny networks, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _common import Options

from bessemer.nn.update_state import begin_update
from bessemer.spec.job import EmaSpec, TrainingSpec
from bessemer.systems.contract import Batch, Clock, System
from bessemer.systems.registry import build
from bessemer.training.distributed import Workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.precision import mixed_precision
from bessemer.training.rng import generator

__all__ = ["Bench", "Flagship", "GpuOptions", "Timer", "flagships", "gpu_options", "out_of_memory"]

NO_GPU = 2


@dataclass(frozen=True, kw_only=True)
class GpuOptions(Options):
    """The command line that all benchmarks for GPUs share."""

    device: torch.device


def gpu_options(description: str | None, parser: argparse.ArgumentParser | None = None) -> GpuOptions:
    """Read `--quick`, `--out` and `--device`; ends the process with 2 where the device is not there.

    Args:
        description: the first line is the help's.
        parser: may hold more arguments; read them again with `parse_known_args`.
    """
    parser = parser or argparse.ArgumentParser()
    parser.description = (description or "").partition("\n")[0]
    parser.add_argument("--quick", action="store_true", help="few rounds; the numbers then say little")
    parser.add_argument("--out", type=Path, help="write command, versions, hardware and raw numbers as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs tiny networks, as a test")
    found, _ = parser.parse_known_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda or '(none)'}"
        name = Path(sys.argv[0]).name
        print(f"{name}: needs an NVIDIA GPU, and PyTorch finds none ({built}); nothing was measured.", file=sys.stderr)
        sys.exit(NO_GPU)
    return GpuOptions(found.quick, found.out, device=torch.device(found.device))


@dataclass(frozen=True)
class Flagship:
    """A configuration that is measured."""

    system: str
    preset: str
    fields: Mapping[str, Any]
    slice_size: int
    cycle: int
    """Iterations after which all lazy updates have run."""
    compiled: tuple[str, ...]
    """Networks that torch.compile may take."""

    def build(self) -> System:
        """The system, weights unset."""
        return build(self.system, self.preset, self.fields)


def flagships(device: torch.device) -> dict[str, Flagship]:
    """The papers' presets; for the CPU the smallest that have all their parts."""
    if device.type == "cpu":
        narrow = {"latent_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8}
        thin = {"generator_width": 8, "discriminator_width": 8}
        return {
            "stylegan2": Flagship("stylegan2", "tiny32", narrow, 2, 1, ()),
            "biggan": Flagship("biggan", "tiny32", thin, 2, 1, ("generator", "discriminator")),
            "nvae": Flagship("nvae", "tiny32", {"width": 4, "groups": (2,)}, 2, 1, ("vae",)),
        }
    return {
        "stylegan2-paper256": Flagship("stylegan2", "paper256", {}, 16, 16, ()),
        "biggan-128": Flagship("biggan", "imagenet128", {}, 64, 1, ("generator", "discriminator")),
        "nvae-cifar10": Flagship("nvae", "cifar10", {}, 32, 1, ("vae",)),
    }


class Bench:
    """A flagship with its engines and averages, trained on noise that lies on the device already.

    Args:
        flagship: what is trained.
        workers: the group.
        training: fields of `training` that differ from its defaults.
    """

    def __init__(self, flagship: Flagship, workers: Workers, **training: Any) -> None:
        n, self.workers = flagship.slice_size, workers
        self.spec = TrainingSpec(total_kimg=1000, batch_size=n * workers.size, slice_size=n, **training)
        self.system = flagship.build()
        self.system.init_weights(generator("cpu", 0, "init"))
        self.networks = self.system.networks()
        for network in self.networks.values():
            network.to(workers.device).train()
        optimizers, updates = self.system.optimizers(), self.system.updates(Clock(0, 0))
        self.engines = build_engines(self.networks, optimizers, self.spec, workers, updates)
        self.emas = [ShardedEma(self.engines[name], EmaSpec(), workers) for name in self.system.sampled_networks]
        self.clock, draws = Clock(0, 0), generator(workers.device, 1, "images", workers.rank)
        c = self.system.config
        images = 2 * torch.rand(n, c.channels, c.resolution, c.resolution, generator=draws, device=draws.device) - 1
        labels = torch.randint(c.classes, (n,), generator=draws, device=draws.device)
        layout = torch.channels_last if self.spec.channels_last else torch.contiguous_format
        self.batch = Batch(images, labels).to(workers.device, layout)

    def iteration(self) -> int:
        """One pass through the updates that are due; real images that all workers saw."""
        repeats = 1
        for update in self.system.updates(self.clock):
            if self.clock.iteration % update.interval:
                continue
            engine = self.engines[update.network]
            for repeat in range(update.repeats):
                draws = generator(self.workers.device, 0, update.name, self.clock.nimg, repeat, self.workers.rank)
                state = begin_update(self.networks.values())
                with engine.only_trained(self.engines):
                    with mixed_precision(self.workers.device, self.spec.precision):
                        loss = update.loss(self.batch, draws)
                    engine.backward(loss.value)
                    state.sum(self.workers.sum)
                    state.commit()
                    engine.step()
            repeats = max(repeats, update.repeats)
        images = repeats * self.spec.batch_size
        for ema in self.emas:
            ema.update(images, self.clock.nimg)
        self.clock = Clock(self.clock.nimg + images, self.clock.iteration + 1)
        self.system.after_iteration(self.clock)
        return images


class Timer:
    """Seconds and the most memory of some work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of the work, until the device is done with it."""
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def empty(self) -> None:
        """Forget what was allocated, and the most that ever was."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Most bytes of tensors at once since :meth:`empty`; None on the CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def out_of_memory(work: Callable[[], Any]) -> Any:
    """What the work returns, or None where the device's memory did not suffice."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
