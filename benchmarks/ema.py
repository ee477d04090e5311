"""What moving averages cost: their update beside a training iteration of BigGAN's cifar10 preset, batch 50.

Goals: all averages (the main one and two profiles) take at most 1 % of an iteration; one average is no slower than
torch's own fused averaging of a model. One worker, ZeRO 0, on the CPU or the GPU that is there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from _common import alternate, finish, parse_options, ratio
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bessemer.nn.update_state import begin_update, end_update
from bessemer.spec.job import EmaSpec, TrainingSpec
from bessemer.systems.contract import Batch, Clock
from bessemer.systems.registry import build
from bessemer.training.distributed import Workers, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.rng import generator

BATCH, REPEATS = 50, 50


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of `work`, with what it left to do on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(workers: Workers, rounds: int) -> dict[str, list[float]]:
    """Seconds of an iteration, and of one update of the averages on each side; sides in turn."""
    device = workers.device
    system = build("biggan", "cifar10", {})
    system.init_weights(generator("cpu", 0, "init"))
    training = TrainingSpec(total_kimg=1, batch_size=BATCH, slice_size=BATCH)
    engines = build_engines(system.networks(), system.optimizers(), training, workers)
    engine = engines["generator"]
    plain = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    main = ShardedEma(engine, EmaSpec(), workers)
    profiles = ShardedEma(engine, EmaSpec(profiles=(0.05, 0.1)), workers)
    draws = torch.Generator().manual_seed(0)
    images: Tensor = torch.rand(BATCH, 3, 32, 32, generator=draws) * 2 - 1
    batch = Batch(images.to(device), torch.randint(10, (BATCH,), generator=draws).to(device))
    networks = system.networks().values()

    def iteration() -> None:
        for update in system.updates(Clock(0, 0)):
            for repeat in range(update.repeats):
                begin_update(networks)
                with engines[update.network].only_trained(engines):
                    loss = update.loss(batch, generator(device, 0, update.name, repeat))
                    engines[update.network].backward(loss.value)
                    end_update(networks)
                    engines[update.network].step()

    def repeated(update: Callable[[], object]) -> Callable[[], float]:
        """Seconds of one of many updates: a single one is too short for the clock."""

        def run() -> float:
            return _timed(device, lambda: [update() for _ in range(REPEATS)]) / REPEATS

        return run

    sides = {
        "iteration": lambda: _timed(device, iteration),
        "main": repeated(lambda: main.update(4 * BATCH, 10_000)),
        "main and two profiles": repeated(lambda: profiles.update(4 * BATCH, 10_000)),
        "torch": repeated(lambda: plain.update_parameters(engine.module)),
    }
    return alternate(sides, rounds)


def run() -> int:
    """Measure, print, write."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    with join_workers() as workers:
        init_deepspeed(workers.device)
        seconds = measure(workers, rounds=1 if options.quick else 10)
    found = [
        ratio("ema/step", seconds["main and two profiles"], seconds["iteration"], goal=0.01),
        ratio("ema/main", seconds["main"], seconds["iteration"], goal=0.01),
        ratio("ema/torch", seconds["main"], seconds["torch"], goal=1.0),
    ]
    return finish(found, {"seconds": seconds}, options)


if __name__ == "__main__":
    sys.exit(run())
