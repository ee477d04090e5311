"""Evaluation of a run's averaged weights: by its workers together, or by a process of its own beside them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.opening import open_job_data
from bessemer.errors import BessemerError, EvaluationError, SpecError
from bessemer.evaluation.grid import sample_grid, save_png, translation_sheet
from bessemer.evaluation.judging import judge_weights
from bessemer.evaluation.names import split_metrics
from bessemer.evaluation.pairs import draw_one, pair_figure
from bessemer.evaluation.records import EvaluationRecord
from bessemer.evaluation.sampling import recompute_batch_norm
from bessemer.evaluation.sheets import Drawn, sheets_of
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.orchestration.verdict import Verdict, verdict_on
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Clock, System
from bessemer.systems.snapshot import SnapshotInfo, fill_networks, sampled_state, save_snapshot
from bessemer.systems.translating import TranslationSystem
from bessemer.training.checkpoint_files import kimg_name
from bessemer.training.distributed import Workers
from bessemer.training.guards import RollBack
from bessemer.training.loop import WriteRecord
from bessemer.training.saving import reason

__all__ = ["EvaluationBeside", "EvaluationInTraining", "Judge", "held_out_images"]

_PAIRS = 12  # on the sheet of nearest neighbours
_log = logging.getLogger(__name__)

_ROLLBACK_FIX = "Lower training.optimizers.*.lr, or raise evaluation.rollback_at."


@contextmanager
def held_out_images(job: JobSpec, dataset: ShardedDataset) -> Iterator[ShardedDataset]:
    """The images whose likelihood is taken: the job's own set of them, or `dataset`.

    Raises:
        SpecError: they have another shape than those of `dataset`.
    """
    path = job.evaluation.held_out
    if path is None:
        yield dataset
        return
    with open_job_data(job.data.model_copy(update={"path": path, "on_bad_sample": "stop"})) as held_out:
        found, wanted = (
            {field.name: field.shape for field in one.manifest.batch_fields} for one in (held_out, dataset)
        )
        if found != wanted:
            raise SpecError(
                f"evaluation.held_out: {path} has {found}, data.path {wanted}; pack both with the same --kind, --size, "
                "--length and --mode."
            )
        yield held_out


class Judge:
    """Judges weights by the job's metrics, draws a grid of their samples, and writes both to the run."""

    def __init__(
        self, run: RunDirectory, job: JobSpec, dataset: ShardedDataset, workers: Workers, write: WriteRecord
    ) -> None:
        self._run, self._job, self._dataset, self._workers, self._write = run, job, dataset, workers, write

    def __call__(self, system: System, info: SnapshotInfo, wanted: Callable[[], bool] = lambda: True) -> bool:
        """Judge the weights in `system`, which `info` describes. Collective.

        Args:
            system: with the weights, on the workers' device.
            info: their origin.
            wanted: asked before anything is written, on the first worker: whether anybody still wants to know.

        Returns:
            On the first worker, whether the results were wanted.

        Raises:
            EvaluationError: on the first worker: some of the metrics could not be computed. The others are written.
        """
        spec, seed = self._job.evaluation, self._job.seed
        failures: list[str] = []
        with held_out_images(self._job, self._dataset) as held_out:
            records = judge_weights(
                system,
                info,
                self._dataset,
                held_out,
                split_metrics(spec.metrics),
                failures,
                samples=spec.samples,
                importance_samples=spec.importance_samples,
                seed=seed,
                device=self._workers.device,
                group=self._workers,
                batch_size=spec.batch_size,
                truncation=spec.truncation,
            )
            if not self._workers.is_first:
                return False
            grid = (
                translation_sheet(system, held_out, spec.grid, seed)
                if isinstance(system, TranslationSystem)
                else sample_grid(system, info.class_counts, spec.grid, seed=seed, truncation=spec.truncation)
            )
        if not wanted():
            return False
        for fields in [r.as_dict() for r in records]:
            self._write("evaluation", info.nimg, **fields)
        name = f"samples/{kimg_name(info.nimg)}.png"
        grid.save(self._run.path / name)
        self._write("samples", info.nimg, path=name)
        try:
            self._leave_sheets(system, info, [r for r in records if isinstance(r, EvaluationRecord)])
        except (BessemerError, OSError, RuntimeError):  # pictures for people: the evaluation stands without them
            _log.exception("sheets could not be drawn")
        if failures:
            raise EvaluationError("\n".join(failures))
        return True

    def _leave_sheets(self, system: System, info: SnapshotInfo, records: Sequence[EvaluationRecord]) -> None:
        """The nearest real images, where a metric asked for them; and what is drawn once, at the end of the run."""
        if system.sample_field != "images" or isinstance(system, TranslationSystem):
            return
        spec, device, sheets = self._job.evaluation, self._workers.device, []
        for record in [r for r in records if r.details.get("pairs")][:1]:
            how: dict[str, Any] = {"seed": self._job.seed, "truncation": spec.truncation, "balance": "data"}
            generated = draw_one(system, info, spec.samples, device=device, **how)
            pairs = record.details["pairs"][:_PAIRS]
            figure = pair_figure(pairs, generated, self._real)
            note = f"Generated left, the nearest real image right; the most suspicious first, by {record.extractor}."
            sheets.append(Drawn("neighbours", "Nearest neighbours", note, figure))
        if self._is_last(info):
            sheets += sheets_of(system, info.class_counts, spec.grid, seed=self._job.seed)
        for sheet in sheets:
            name = f"samples/{kimg_name(info.nimg)}-{sheet.name}.png"
            save_png(self._run.path / name, sheet.pixels)
            self._write("sheet", info.nimg, path=name, title=sheet.title, note=sheet.note)

    def _is_last(self, info: SnapshotInfo) -> bool:
        """Whether the run ends here, at its total or because its metric, which is written already, stalls."""
        if info.nimg >= self._job.training.total_kimg * 1000:
            return True
        verdict = verdict_on(self._run.path, self._job.evaluation)
        return verdict is not None and verdict.action == "stop"

    def _real(self, number: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self._dataset.read(np.array([number]))[0]
        return image


class _Evaluation:
    """What both ways have in common: a copy of the averaged weights, and what the results mean for the run."""

    def __init__(
        self, run: RunDirectory, job: JobSpec, system: System, workers: Workers, write: WriteRecord, info: SnapshotInfo
    ) -> None:
        self._run, self._job, self._workers, self._write, self._info = run, job, workers, write, info
        # A system of its own: nothing that sampling does can touch the one that is trained.
        self._sampler = type(system)(system.config)
        for name, network in self._sampler.networks().items():
            network.to(workers.device if name in system.sampled_networks else "meta").requires_grad_(False)

    def _take(self, clock: Clock, ema_state: Mapping[str, Tensor]) -> SnapshotInfo:
        """Fill the copy, and say what it holds."""
        fill_networks(self._sampler, ema_state)
        if self._job.ema.batch_norm == "recomputed":
            counts = self._info.class_counts
            recompute_batch_norm(self._sampler, counts, seed=self._job.seed, device=self._workers.device)
        return replace(self._info, nimg=clock.nimg)

    def _conclude(self, clock: Clock) -> str | None:
        """Why the run should stop early, if it should. Collective.

        Raises:
            RollBack: the run should go back.
        """
        found = verdict_on(self._run.path, self._job.evaluation) if self._workers.is_first else None
        verdict: Verdict | None = self._workers.from_first(found)
        if verdict is None:
            return None
        if verdict.action == "rollback":
            raise RollBack(verdict.reason, _ROLLBACK_FIX, latest=verdict.latest)
        self._write("event", clock.nimg, event="stopped_early", reason=verdict.reason)
        return verdict.reason


class EvaluationInTraining(_Evaluation):
    """Writes a snapshot and judges it while training stands still: each worker draws its share of the samples."""

    def __init__(self, judge: Judge, *args: Any) -> None:
        super().__init__(*args)
        self._judge = judge

    def __call__(self, clock: Clock, ema_state: Mapping[str, Tensor]) -> str | None:
        """Collective. What fails on the disk or in the metrics costs this evaluation, and not the run."""
        info, error = self._take(clock, ema_state), None
        if self._workers.is_first:
            try:
                directory = self._run.path / "snapshots" / kimg_name(clock.nimg)
                info = save_snapshot(directory, sampled_state(self._sampler), info)
            except OSError as e:
                error = reason(e)
        error = self._workers.from_first(error)
        if error is None:
            error = self._judged(info)
        if error is not None:
            self._write("event", clock.nimg, event="evaluation_failed", reason=error)
        return self._conclude(clock)

    def _judged(self, info: SnapshotInfo) -> str | None:
        """Judge; the error, or None. Metrics raise on all workers alike, and files are the first one's."""
        error = None
        try:
            self._judge(self._sampler, info)
        except (BessemerError, OSError) as e:
            _log.exception("evaluation failed")
            error = reason(e)
        errors = [e for e in self._workers.gather(error) if e is not None]
        return errors[0] if errors else None

    def finish(self) -> None:
        """Nothing is under way."""


class EvaluationBeside(_Evaluation):
    """Publishes a snapshot, and lets training go on; :mod:`bessemer.orchestration.evaluator` judges it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._writing: threading.Thread | None = None

    def __call__(self, clock: Clock, ema_state: Mapping[str, Tensor]) -> str | None:
        """Copy the weights, and write them in the background. Collective."""
        info = self._take(clock, ema_state)
        if self._workers.is_first:
            self.finish()
            tensors = {name: t.detach().cpu().clone() for name, t in sampled_state(self._sampler).items()}
            self._writing = threading.Thread(target=self._publish, args=(tensors, info), name="snapshot", daemon=True)
            self._writing.start()
        return self._conclude(clock)

    def _publish(self, tensors: dict[str, Tensor], info: SnapshotInfo) -> None:
        began, path = time.monotonic(), f"snapshots/{kimg_name(info.nimg)}"
        try:
            info = save_snapshot(self._run.path / path, tensors, info)
            seconds = round(time.monotonic() - began, 4)
            self._write(
                "event", info.nimg, event="snapshot", path=path, weights_sha256=info.weights_sha256, seconds=seconds
            )
        except Exception as e:
            _log.exception("a snapshot could not be written")
            self._write("event", info.nimg, event="evaluation_failed", reason=reason(e))

    def finish(self) -> None:
        """Wait until the snapshot is published: no checkpoint may overtake it, or a run killed between has none."""
        if self._writing is not None:
            self._writing.join()
