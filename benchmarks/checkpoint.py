"""What a checkpoint costs: time that training waits, and time to resume, against writing in the foreground.

The state is that of BigGAN's `cifar10` preset with Adam and one average: 119 MB. `stall` is the wait for a save in the
background over one in the foreground. `slowdown` is an iteration while files are being written over one while none are.
`resume` is verifying and restoring over saving in the foreground. All on one worker of one thread.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _common import alternate, finish, parse_options, ratio

from bessemer.spec.job import CheckpointSpec, EmaSpec, TrainingSpec
from bessemer.systems.contract import Batch, Clock
from bessemer.systems.registry import build
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.rng import generator

_SLICE = 4


class Bench:
    """One state, saved again and again to a directory of its own."""

    def __init__(self, workers: Workers, root: Path) -> None:
        self.system = build("biggan", "cifar10", {}, {})
        self.system.init_weights(generator("cpu", 0, "init"))
        training = TrainingSpec(total_kimg=1, batch_size=_SLICE, slice_size=_SLICE)
        self.engines = build_engines(self.system.networks(), self.system.optimizers(), training, workers)
        self.emas = {n: ShardedEma(self.engines[n], EmaSpec(), workers) for n in self.system.sampled_networks}
        self.identity = Identity("biggan", self.system.config.model_dump(mode="json"), 0, _SLICE, _SLICE, "")
        self.stores = {
            background: CheckpointStore(root / str(background), CheckpointSpec(background=background), workers)
            for background in (True, False)
        }
        self.clock = Clock(0, 0)
        for network in self.system.networks().values():
            network.train()
        self.iterate()  # allocates the optimizer states

    def iterate(self, before_change: Callable[[], None] = lambda: None) -> float:
        """Train one iteration of one slice; its seconds. As in training, weights change only after `before_change`."""
        began = time.perf_counter()
        for update in self.system.updates(self.clock):
            draws = generator("cpu", 0, update.name, self.clock.nimg)
            images = torch.randn(_SLICE, 3, 32, 32, generator=draws)
            engine = self.engines[update.network]
            with engine.only_trained(self.engines):
                loss = update.loss(Batch(images, torch.zeros(_SLICE, dtype=torch.int64)), draws)
                engine.backward(loss.value)
                before_change()
                engine.step()
        for ema in self.emas.values():
            ema.update(_SLICE, self.clock.nimg)
        self.clock = Clock(self.clock.nimg + _SLICE, self.clock.iteration + 1)
        return time.perf_counter() - began

    def save(self, background: bool) -> float:
        """Save, train an iteration, and wait for the files; seconds that training had to wait."""
        self.iterate()
        os.sync()  # what the other side wrote must not be written in our time
        store = self.stores[background]
        store.save(self.clock, self.identity, self.engines, self.emas, {})
        self.iterate(store.copied)
        store.finish()
        (report,) = store.reports()
        assert report.error is None, report.error
        return report.stall if background else report.seconds

    def iterate_while_writing(self) -> float:
        """Seconds of one iteration that lies within a save in the background; several saves if one is too short."""
        store = self.stores[True]
        for _ in range(20):
            store.save(self.clock, self.identity, self.engines, self.emas, {})
            seconds = self.iterate(store.copied)
            still_writing = not store.reports() and not store.advance() and not store.reports()
            store.finish()
            store.reports()
            if still_writing:
                return seconds
        return float("nan")

    def resume(self) -> float:
        """Verify the newest checkpoint and restore it; seconds."""
        began = time.perf_counter()
        path, skipped = self.stores[False].find()
        assert path is not None, skipped
        self.stores[False].restore(path, self.identity, self.engines, self.emas)
        return time.perf_counter() - began

    def megabytes(self) -> float:
        newest = self.stores[False].complete()[-1]
        return sum(f.stat().st_size for f in newest.iterdir()) / 1e6


def main() -> int:
    """Measure and print."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    # Here, on a disk: /tmp may be memory, where files are written in no time.
    with tempfile.TemporaryDirectory(dir=".") as directory, join_workers() as workers:
        init_deepspeed(workers.device)
        bench = Bench(workers, Path(directory))
        seconds = alternate(
            {
                "background": lambda: bench.save(True),
                "foreground": lambda: bench.save(False),
                "resume": bench.resume,
                "iteration": bench.iterate,
                "iteration while writing": bench.iterate_while_writing,
            },
            rounds=3 if options.quick else 20,
            warm_up=2,
        )
        return finish(
            [
                ratio("checkpoint/stall", seconds["background"], seconds["foreground"], goal=0.05),
                ratio("checkpoint/slowdown", seconds["iteration while writing"], seconds["iteration"]),
                ratio("checkpoint/resume", seconds["resume"], seconds["foreground"], goal=1.0),
            ],
            {"seconds": seconds, "megabytes": bench.megabytes()},
            options,
        )


if __name__ == "__main__":
    end_process(main())
