"""The training loop: what training is, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from bessemer.nn.norm import share_statistics
from bessemer.nn.update_state import begin_update
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, Loss, System, Update
from bessemer.training.agreement import check_agreement
from bessemer.training.averages import Averages
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.collapse import CollapseWatch
from bessemer.training.distributed import Workers
from bessemer.training.ema import ShardedEma
from bessemer.training.ema_store import EmaStore
from bessemer.training.engine import NetworkEngine
from bessemer.training.guards import Guards, RollBack
from bessemer.training.memory_advice import MemoryAdvice
from bessemer.training.meter import StepMeter
from bessemer.training.precision import mixed_precision
from bessemer.training.rng import generator
from bessemer.training.schedule import lr_factor
from bessemer.training.uploads import LAST_UPLOAD_SECONDS

__all__ = ["Evaluate", "Stream", "Trainer", "WriteRecord", "owned_slices"]

WriteRecord = Callable[..., None]
"""``write(kind, nimg, **fields)`` of the run's journal."""


class Stream(Protocol):
    """Real images of this worker's slices, as a function of the image clock."""

    def batch(self, nimg: int) -> list[Batch]: ...


class Evaluate(Protocol):
    """Looks at the averaged weights at one moment; collective. Says why the run should stop early, if it should."""

    def __call__(self, clock: Clock, ema_state: Mapping[str, Tensor]) -> str | None: ...


def owned_slices(slices: int, rank: int, size: int) -> list[int]:
    """Slices of the global batch that worker `rank` of `size` computes."""
    return list(range(rank, slices, size))


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
        self.guards = Guards(job, workers, write)
        self.collapse = CollapseWatch(job.guards, system, workers, write)
        self.memory = MemoryAdvice(job, workers.size, workers.device)
        self._averages = Averages(workers)
        self._logged_at = (0.0, 0)

    def resume(self, latest: int | None = None) -> bool:
        """Go to the newest undamaged checkpoint, if there is one (until image `latest`). Collective; says whether."""
        path, skipped = self.checkpoints.find(latest)
        for reason in skipped:
            self.write("event", self.clock.nimg, event="checkpoint_skipped", reason=reason)
        if path is not None:
            self.clock, state = self.checkpoints.restore(path, self.identity, self.engines, self.emas)
            self.system.load_state_dict(state["system"])
            self.guards.load_state_dict(state["guards"])
            self.collapse.load_state_dict(state["collapse"])
            for name, engine in self.engines.items():
                engine.load_state_dict(state["engines"][name])
            if self.profiles is not None:
                self.profiles.forget_after(self.clock.nimg)
            self.write("event", self.clock.nimg, event="resumed", checkpoint=path.name, workers=self.workers.size)
        return path is not None

    def run(self, until_kimg: float = float("inf")) -> bool:
        """Train until the image clock reaches the job's end, or evaluation or a signal says stop. Collective.

        Returns:
            Whether it came there, or to `until_kimg`. If not, there is a checkpoint of where it stopped.

        Raises:
            TrainingError: the guards gave up, or two workers differ.
            MachineError: the memory of the device did not suffice.
        """
        job, total = self.job, round(min(self.job.training.total_kimg, until_kimg) * 1000)
        if self.clock.nimg == 0 and job.evaluation.untrained:
            self._evaluate()
        self._logged_at = (time.monotonic(), self.clock.nimg)
        for network in self.system.networks().values():
            network.train()
        while self.clock.nimg < total:
            before = self.clock
            try:
                with self.meter.collectives(), self.memory.given():
                    self._iteration()
                last = self.clock.nimg >= total
                if self.clock.crossed(job.guards.every_kimg, before):
                    self._look_for_collapse()
                if last or self.clock.crossed(job.training.log_every_kimg, before):
                    self._log()
                # Evaluating comes before saving: a run killed in between evaluates again rather than never.
                if last or self.clock.crossed(job.evaluation.every_kimg, before):
                    last = self._evaluate() or last
            except RollBack as why:
                self._roll_back(why)
                continue
            if self.profiles is not None and (last or self.clock.crossed(job.ema.store_every_kimg, before)):
                self.profiles.save(self.clock, self.emas)
            if last or self.clock.crossed(job.checkpoint.every_kimg, before):
                self._save()
            if self.checkpoints.advance(self.stop_requested()) and not last:
                return self._preempted()
            self._report_saves()
            if last:
                break
        self._finish_saves(LAST_UPLOAD_SECONDS)
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
            self.checkpoints.copied()
            for ema in self.emas.values():
                ema.update(images, clock.nimg)
        self.clock = Clock(nimg=clock.nimg + images, iteration=clock.iteration + 1)
        for name in self.system.renewed(clock, self.clock):
            self.engines[name].renew_optimizer()
        self.system.after_iteration(self.clock)

    def _update(self, update: Update, nimg: int) -> None:
        """One optimizer step: gradients of this worker's slices, summed over slices and averaged over workers."""
        engine = self.engines[update.network]
        device, networks, part = self.workers.device, self.system.networks().values(), self.meter.part
        losses: list[Loss] = []
        with part("data"):
            batches = self.stream.batch(self.guards.data_position(nimg))
        with part("forward"):
            state = begin_update(networks)
        with engine.only_trained(self.engines):
            for index, batch in zip(self.slices, batches, strict=True):
                draws = generator(device, self.guards.seed, update.name, nimg, index)
                with part("data"):
                    on_device = self._on_device(batch, index)
                with self.meter.slice(update.name):
                    with part("forward"), mixed_precision(device, self.job.training.precision):
                        loss = update.loss(on_device, draws)
                    with part("backward"):
                        engine.backward(loss.value / len(self.slices))
                losses.append(Loss(loss.value.detach(), loss.scalars))
            with part("communicate"):
                accepted = self.guards.accept(update, engine, [loss.value for loss in losses], state)
                self.checkpoints.copied()  # from here on, the state changes
                if accepted:
                    state.commit()
            with part("optimizer"):
                if accepted:
                    engine.step(lr_factor(self.job.training, nimg) * self.guards.lr_factor)
                else:
                    engine.discard()
        self.guards.stepped(update, engine, nimg)
        if accepted:
            self._averages.add_losses(update.name, losses)
            if engine.gradients.norm is not None:
                self._averages.add(f"grad_norm/{engine.name}", engine.gradients.norm)

    def _on_device(self, batch: Batch, index: int) -> Batch:
        layout = torch.channels_last if self.job.training.channels_last else torch.contiguous_format
        return batch.to(self.workers.device, layout).as_slice(index, self.job.slices)

    def _log(self) -> None:
        """Write the means since the last line to the journal, and go back if they are not finite."""
        then, nimg = self._logged_at
        seconds = time.monotonic() - then
        for name, value in self.meter.take_seconds().items():  # per kimg, mean over the workers
            per_kimg = torch.tensor(value * 1000 / (self.clock.nimg - nimg), device=self.workers.device)
            self._averages.add(f"time/{name}", per_kimg)
        values = self._averages.take()
        self._logged_at = (time.monotonic(), self.clock.nimg)
        bad = [name for name, value in values.items() if not abs(value) < float("inf")]
        if bad and not self.job.training.sanitize_gradients:
            raise RollBack(
                f"{', '.join(bad)} was not finite",
                "Lower training.optimizers.*.lr or set training.gradient_clipping.",
            )
        for engine in self.engines.values():
            values |= engine.readings()
        values["throughput/img_per_s"] = (self.clock.nimg - nimg) / max(seconds, 1e-9)
        if (mfu := self.meter.take_mfu(seconds)) is not None:
            values["throughput/mfu"] = mfu
        self.write("metrics", self.clock.nimg, values=values)
        self.collapse.logged(values, self.clock)

    def _look_for_collapse(self) -> None:
        batches = self.stream.batch(self.guards.data_position(self.clock.nimg))
        self.collapse.look(batches, self.slices, self.guards.seed, self.clock)
        for name, value in self.collapse.readings.items():
            self._averages.add(name, torch.tensor(value, device=self.workers.device))

    def _roll_back(self, why: RollBack) -> None:
        """Go back to a checkpoint and take another way from there."""
        self.guards.count_rollback(why, self.clock)
        if not any(self.resume(latest) for latest in self.guards.bounds(why)):
            raise self.guards.give_up(why, self.clock, self.guards.no_checkpoint(why))
        self.guards.went_back(self.clock.nimg)
        self.checkpoints.forget_after(self.clock.nimg)
        self._saved_at = None
        self._averages = Averages(self.workers)
        self._logged_at = (time.monotonic(), self.clock.nimg)

    def ema_state(self) -> dict[str, Tensor]:
        """`<network>.<key>` -> averaged weights and current buffers of what sampling needs. Collective."""
        return {f"{n}.{k}": t for n in self.system.sampled_networks for k, t in self.emas[n].full_state().items()}

    def _evaluate(self) -> bool:
        """Evaluate, and say whether to stop early."""
        then = time.monotonic()
        reason = self.evaluate(self.clock, self.ema_state())
        moment, nimg = self._logged_at
        self._logged_at = (moment + time.monotonic() - then, nimg)  # throughput is of training alone
        return reason is not None

    def _save(self) -> None:
        """Begin a checkpoint; the state is copied and written while training goes on."""
        if self.job.guards.compare_workers:
            check_agreement(self.engines, self.workers, self.clock)
        state: dict[str, Any] = {
            "system": self.system.state_dict(),
            "engines": {name: engine.state_dict() for name, engine in self.engines.items()},
            "guards": self.guards.state_dict(),
            "collapse": self.collapse.state_dict(),
        }
        self.checkpoints.save(self.clock, self.identity, self.engines, self.emas, state)
        self._saved_at = self.clock.nimg

    def _report_saves(self) -> None:
        """Write to the journal which checkpoints became complete or were uploaded since the last call, or could not."""
        for fields in self.checkpoints.events():
            self.write("event", self.clock.nimg, **fields)

    def _finish_saves(self, seconds: float) -> None:
        """Wait for what is being written, and for its upload so many seconds."""
        self.checkpoints.finish()
        self._report_saves()
        self.checkpoints.await_uploads(seconds)
        self._report_saves()

    def _preempted(self) -> bool:
        """Write a checkpoint of this moment, wait for it, and say so. Not the end of the run."""
        if self._saved_at != self.clock.nimg:
            self._save()
        self._finish_saves(self.job.checkpoint.upload_grace_s)
        self.write("event", self.clock.nimg, event="preempted", workers=self.workers.size)
        return False
