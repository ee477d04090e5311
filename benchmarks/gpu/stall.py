"""What a checkpoint costs a GPU: time that training waits for the copy of BigGAN-128's state to the host.

Goal: saving in the background makes training wait for at most 0.05 of what saving in the foreground takes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _gpu import Bench, Timer, flagships, gpu_options

from _common import alternate, finish, ratio  # isort: skip  # _gpu says where it is
from bessemer.spec.job import CheckpointSpec, EmaSpec
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma

GOAL = 0.05


class Saves:
    """One state, saved again and again to a directory of its own."""

    def __init__(self, workers: Workers, root: Path) -> None:
        (flagship,) = (f for name, f in flagships(workers.device).items() if name.startswith("biggan"))
        self.bench, self.timer = Bench(flagship, workers), Timer(workers.device)
        engines, system = self.bench.engines, self.bench.system
        self.emas = {name: ShardedEma(engines[name], EmaSpec(), workers) for name in system.sampled_networks}
        n = flagship.slice_size
        self.identity = Identity(flagship.system, system.config.model_dump(mode="json"), 0, n, n, "")
        self.stores = {
            background: CheckpointStore(root / str(background), CheckpointSpec(background=background), workers)
            for background in (True, False)
        }
        self.bench.iteration()  # allocates the optimizers' states

    def save(self, background: bool) -> float:
        """Save, and wait for the files; seconds that training had to wait."""
        self.bench.iteration()
        self.timer.wait()
        store = self.stores[background]
        store.save(self.bench.clock, self.identity, self.bench.engines, self.emas, {})
        store.copied()
        store.finish()
        (report,) = store.reports()
        assert report.error is None, report.error
        return float(report.stall if background else report.seconds)

    def megabytes(self) -> float:
        """Of a checkpoint."""
        newest = self.stores[False].complete()[-1]
        return sum(f.stat().st_size for f in newest.iterdir()) / 1e6


def main() -> int:
    """Measure and print."""
    options = gpu_options(__doc__)
    with tempfile.TemporaryDirectory(dir=".") as directory, join_workers() as workers:
        init_deepspeed(workers.device)
        saves = Saves(workers, Path(directory))
        sides = {"background": lambda: saves.save(True), "foreground": lambda: saves.save(False)}
        seconds = alternate(
            {**sides, "iteration": lambda: saves.timer.seconds(saves.bench.iteration)}, 2 if options.quick else 10
        )
        raw: dict[str, Any] = {"seconds": seconds, "megabytes": saves.megabytes()}
        found = ratio("stall", seconds["background"], seconds["foreground"], GOAL)
        return finish([found], raw, options) if workers.is_first else 0


if __name__ == "__main__":
    end_process(main())
