"""The training loop: what training is, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bessemer.errors import TrainingError
from bessemer.nn.norm import share_statistics
from bessemer.nn.update_state import begin_update, end_update
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, System, Update
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers
from bessemer.training.ema import ShardedEma
from bessemer.training.ema_store import EmaStore
from bessemer.training.engine import NetworkEngine
from bessemer.training.meter import StepMeter
from bessemer.training.precision import mixed_precision
from bessemer.training.rng import generator
from bessemer.training.schedule import lr_factor

__all__ = ["Evaluate", "Stream", "Trainer", "WriteRecord", "owned_slices"]

WriteRecord = Callable[..., None]
"""``write(kind, nimg, **fields)`` of the run's journal."""


class Stream(Protocol):
    """Real images of this worker's slices, as a function of the image clock."""

    def batch(self, nimg: int) -> list[Batch]: ...


class Evaluate(Protocol):
    """Looks at the averaged weights at one moment; collective."""

    def __call__(self, clock: Clock, ema_state: Mapping[str, Tensor]) -> None: ...


def owned_slices(slices: int, rank: int, size: int) -> list[int]:
    """Slices of the global batch that worker `rank` of `size` computes."""
    return list(range(rank, slices, size))


def crossed(every_kimg: float, before: int, now: int) -> bool:
    """Whether the image clock passed a multiple of `every_kimg` between two moments."""
    every = every_kimg * 1000
    return int(now // every) > int(before // every)


@dataclass
class _Averages:
    """Means of scalars over slices and steps, kept on the device: nothing waits for them until they are logged."""

    workers: Workers
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().float().reshape(())
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Means over all workers since the last call. Collective."""
        names = sorted(self.sums)
        if not names:
            return {}
        stacked = torch.stack([self.sums[n] / self.counts[n] for n in names]).double()
        means = (self.workers.sum(stacked) / self.workers.size).tolist()
        self.sums.clear()
        self.counts.clear()
        return dict(zip(names, means, strict=True))


class Trainer:
    """Trains one system on one group of workers, from where the run stands to its end."""

    def __init__(
        self,
        job: JobSpec,
        system: System,
        engines: Mapping[str, NetworkEngine],
        emas: Mapping[str, ShardedEma],
        stream: Stream,
        checkpoints: CheckpointStore,
        identity: Identity,
        workers: Workers,
        write: WriteRecord,
        evaluate: Evaluate,
        profiles: EmaStore | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.job, self.system, self.engines, self.emas = job, system, engines, emas
        self.stream, self.checkpoints, self.identity = stream, checkpoints, identity
        self.workers, self.write, self.evaluate, self.profiles = workers, write, evaluate, profiles
        self.stop_requested = stop_requested
        self.clock = Clock(nimg=0, iteration=0)
        self._saved_at: int | None = None
        if job.training.batch_statistics == "workers":
            share_statistics(system.networks().values(), workers.rank, workers.size)
        self.slices = owned_slices(job.slices, workers.rank, workers.size)
        self.meter = StepMeter(workers.device, job.training.precision)
        self._averages = _Averages(workers)
        self._logged_at = (0.0, 0)

    def resume(self) -> bool:
        """Go back to the newest undamaged checkpoint, if there is one. Collective; says whether there was."""
        path, skipped = self.checkpoints.find()
        for reason in skipped:
            self.write("event", self.clock.nimg, event="checkpoint_skipped", reason=reason)
        if path is not None:
            self.clock, state = self.checkpoints.restore(path, self.identity, self.engines, self.emas)
            self.system.load_state_dict(state["system"])
            for name, engine in self.engines.items():
                engine.load_state_dict(state["engines"][name])
            if self.profiles is not None:
                self.profiles.forget_after(self.clock.nimg)
            self.write("event", self.clock.nimg, event="resumed", checkpoint=path.name, workers=self.workers.size)
        return path is not None

    def run(self) -> bool:
        """Train until the image clock reaches the job's end, or a worker is asked to stop. Collective.

        Returns:
            Whether the end was reached. If not, there is a checkpoint of where it stopped.

        Raises:
            TrainingError: a loss is not finite.
        """
        job, total = self.job, round(self.job.training.total_kimg * 1000)
        if self.clock.nimg == 0:
            self._evaluate()
        self._logged_at = (time.monotonic(), self.clock.nimg)
        for network in self.system.networks().values():
            network.train()
        while self.clock.nimg < total:
            before = self.clock
            with self.meter.collectives():
                self._iteration()
            now, last = self.clock.nimg, self.clock.nimg >= total
            if last or crossed(job.training.log_every_kimg, before.nimg, now):
                self._log()
            if self.profiles is not None and (last or crossed(job.ema.store_every_kimg, before.nimg, now)):
                self.profiles.save(self.clock, self.emas)
            # Evaluating comes first: a run killed in between evaluates again rather than never.
            if last or crossed(job.evaluation.every_kimg, before.nimg, now):
                self._evaluate()
            if last or crossed(job.checkpoint.every_kimg, before.nimg, now):
                self._save()
            if self.checkpoints.advance(self.stop_requested()) and not last:
                return self._preempted()
            self._report_saves()
        self.checkpoints.finish()
        self._report_saves()
        return True

    def _iteration(self) -> None:
        """All due updates once, then the averages, then the clock."""
        clock, batch_size = self.clock, self.job.training.batch_size
        batches_used = 1
        for update in self.system.updates(clock):
            if clock.iteration % update.interval:
                continue
            for repeat in range(update.repeats):
                self._update(update, clock.nimg + repeat * batch_size)
            batches_used = max(batches_used, update.repeats)
        images = batches_used * batch_size
        with self.meter.part("ema"):
            for ema in self.emas.values():
                ema.update(images, clock.nimg)
        self.clock = Clock(nimg=clock.nimg + images, iteration=clock.iteration + 1)
        self.system.after_iteration(self.clock)

    def _update(self, update: Update, nimg: int) -> None:
        """One optimizer step: gradients of this worker's slices, summed over slices and averaged over workers."""
        engine = self.engines[update.network]
        device, networks, part = self.workers.device, self.system.networks().values(), self.meter.part
        with part("data"):
            batches = self.stream.batch(nimg)
        with part("forward"):
            begin_update(networks)
        with engine.only_trained(self.engines):
            for index, batch in zip(self.slices, batches, strict=True):
                draws = generator(device, self.job.seed, update.name, nimg, index)
                with part("data"):
                    on_device = self._on_device(batch)
                with self.meter.slice(update.name):
                    with part("forward"), mixed_precision(device, self.job.training.precision):
                        loss = update.loss(on_device, draws)
                    with part("backward"):
                        engine.backward(loss.value / len(self.slices))
                self._averages.add(f"loss/{update.name}", loss.value)
                for name, value in loss.scalars.items():
                    self._averages.add(name, value)
            with part("communicate"):
                end_update(networks, self.workers.sum)
            with part("optimizer"):
                engine.step(lr_factor(self.job.training, nimg))
        if engine.gradients.norm is not None:
            self._averages.add(f"grad_norm/{engine.name}", engine.gradients.norm)

    def _on_device(self, batch: Batch) -> Batch:
        layout = torch.channels_last if self.job.training.channels_last else torch.contiguous_format
        images = batch.images.to(self.workers.device, memory_format=layout)
        return Batch(images=images, labels=batch.labels.to(self.workers.device))

    def _log(self) -> None:
        """Write the means since the last line to the journal, and stop if they are not finite."""
        then, nimg = self._logged_at
        seconds = time.monotonic() - then
        for name, value in self.meter.take_seconds().items():  # per kimg, mean over the workers
            per_kimg = torch.tensor(value * 1000 / (self.clock.nimg - nimg), device=self.workers.device)
            self._averages.add(f"time/{name}", per_kimg)
        values = self._averages.take()
        self._logged_at = (time.monotonic(), self.clock.nimg)
        bad = [name for name, value in values.items() if not abs(value) < float("inf")]
        for engine in self.engines.values():
            values |= engine.readings()
        values["throughput/img_per_s"] = (self.clock.nimg - nimg) / max(seconds, 1e-9)
        if (mfu := self.meter.take_mfu(seconds)) is not None:
            values["throughput/mfu"] = mfu
        if not bad:
            self.write("metrics", self.clock.nimg, values=values)
            return
        last = self.checkpoints.complete()
        raise TrainingError(
            f"{', '.join(bad)}: not finite at {self.clock.kimg:g} kimg. Lower training.optimizers.*.lr or set "
            f"training.gradient_clipping; {f'the last checkpoint is {last[-1].name}' if last else 'no checkpoint yet'}."
        )

    def ema_state(self) -> dict[str, Tensor]:
        """`<network>.<key>` -> averaged weights and current buffers of what sampling needs. Collective."""
        return {f"{n}.{k}": t for n in self.system.sampled_networks for k, t in self.emas[n].full_state().items()}

    def _evaluate(self) -> None:
        then = time.monotonic()
        self.evaluate(self.clock, self.ema_state())
        moment, nimg = self._logged_at
        self._logged_at = (moment + time.monotonic() - then, nimg)  # throughput is of training alone

    def _save(self) -> None:
        """Copy the state; it is written while training goes on."""
        engines = {name: engine.state_dict() for name, engine in self.engines.items()}
        state: dict[str, Any] = {"system": self.system.state_dict(), "engines": engines}
        self.checkpoints.save(self.clock, self.identity, self.engines, self.emas, state)
        self._saved_at = self.clock.nimg

    def _report_saves(self) -> None:
        """Write to the journal which checkpoints became complete since the last call, and which could not."""
        for done in self.checkpoints.reports():
            how = {"path": done.name, "stall_s": round(done.stall, 4), "seconds": round(done.seconds, 4)}
            if done.error is None:
                self.write("event", self.clock.nimg, event="checkpoint", **how)
            else:
                self.write("event", self.clock.nimg, event="checkpoint_failed", reason=done.error, **how)

    def _preempted(self) -> bool:
        """Write a checkpoint of this moment, wait for it, and say so. Not the end of the run."""
        if self._saved_at != self.clock.nimg:
            self._save()
        self.checkpoints.finish()
        self._report_saves()
        self.write("event", self.clock.nimg, event="preempted", workers=self.workers.size)
        return False
