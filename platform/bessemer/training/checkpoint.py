"""Checkpoints: every worker writes its own fragments, in the background; a manifest with checksums is written last.

:mod:`bessemer.training.checkpoint_files` says what lies on the disk, and :mod:`bessemer.training.saving` how it gets
there. The store below is the only thing that the loop sees.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bessemer.errors import CheckpointError
from bessemer.files import hidden_name
from bessemer.spec.job import CheckpointSpec
from bessemer.systems.contract import Clock
from bessemer.training.checkpoint_files import (
    SHARED,
    complete_checkpoints,
    damage,
    delete_checkpoint,
    delete_stale,
    kimg_name,
    newest_undamaged,
    read_state,
)
from bessemer.training.distributed import Workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import NetworkEngine
from bessemer.training.fragments import Fragment
from bessemer.training.host_copy import HostCopy
from bessemer.training.pulse import Pulse
from bessemer.training.retention import expendable
from bessemer.training.saving import SaveReport, Saving, reason
from bessemer.training.uploads import Uploads

__all__ = ["CheckpointStore", "Identity", "StoredFragments"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What must not change between saving and resuming, or the run would be another one."""

    system: str
    config: Mapping[str, Any]
    seed: int
    batch_size: int
    slice_size: int
    data_hash: str

    def check(self, stored: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError if `stored` is of another run."""
        for field, value in vars(self).items():
            if stored.get(field) != value:
                raise CheckpointError(
                    f"{path}: was written with {field} = {stored.get(field)!r}, but the job says {value!r}; "
                    "resume with the original job, or start a new run."
                )


class StoredFragments:
    """Reads parts of tensors from the fragment files of all workers that wrote a checkpoint."""

    def __init__(self, path: Path, layout: Mapping[str, list[list[Any]]]) -> None:
        self._path, self._layout = path, layout
        self._open: dict[str, Any] = {}

    def fill(self, key: str, fragment: Fragment) -> None:
        """Copy the stored elements that `fragment` covers into it."""
        start, stop = fragment.start, fragment.start + fragment.data.numel()
        found = 0
        for file, entry, at, numel in self._layout.get(key, ()):
            low, high = max(start, at), min(stop, at + numel)
            if low >= high:
                continue
            if file not in self._open:
                self._open[file] = safe_open(self._path / file, framework="pt")
            part = self._open[file].get_slice(entry)[low - at : high - at]
            fragment.data[low - start : high - start].copy_(part)
            found += high - low
        if found != stop - start:
            raise CheckpointError(f"{self._path}: holds {found} of {stop - start} elements of {key}.")


class CheckpointStore:
    """The checkpoints of one run. All methods but `complete`, `copied`, `reports` and `events` are collective.

    Args:
        root: directory of the checkpoints.
        spec: which are kept, and whether files are written in the background.
        workers: the group.
        scores: images seen -> value of the metric `keep_best`, lower is better; asked on the first worker.
        undecided: images seen where that value is yet to come; asked on the first worker.
        ready: returns when a checkpoint may become visible, on the first worker.
        uploads: what copies complete checkpoints to a store, on the first worker.
    """

    def __init__(
        self,
        root: Path,
        spec: CheckpointSpec,
        workers: Workers,
        scores: Callable[[], Mapping[int, float]] = dict,
        undecided: Callable[[], Collection[int]] = tuple,
        ready: Callable[[], None] = lambda: None,
        uploads: Uploads | None = None,
    ) -> None:
        self.root, self._spec, self._workers, self._uploads = root, spec, workers, uploads
        self._scores, self._undecided, self._ready = scores, undecided, ready
        self._share, self._shared = HostCopy(), HostCopy()
        self._pulse = Pulse(workers)
        self._saving: Saving | None = None
        self._spoke_of: Saving | None = None
        """What the last beat of the pulse was about: it arrives one iteration later."""
        self._reports: list[SaveReport] = []
        self._damaged: set[Path] = set()

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.root)

    def save(
        self,
        clock: Clock,
        identity: Identity,
        engines: Mapping[str, NetworkEngine],
        emas: Mapping[str, ShardedEma],
        system_state: Mapping[str, Any],
    ) -> None:
        """Begin to write a checkpoint. Weights, optimizer states and averages must stay until :meth:`copied`.

        Waits for the checkpoint before, if that is still being written. How saving ended, :meth:`reports` tells.
        """
        self.finish()
        began = time.monotonic()
        final = self.root / kimg_name(clock.nimg)
        aside, error = self._workers.from_first(self._make_aside(final) if self._workers.is_first else None)
        if error is not None:
            if self._workers.is_first:
                self._reports.append(SaveReport(final.name, error, time.monotonic() - began, 0.0))
            return
        kinds = {name: self._kinds(engine, emas.get(name)) for name, engine in engines.items()}
        tensors: dict[str, Tensor] = {}
        layout: dict[str, tuple[int, int]] = {}
        for network, by_kind in kinds.items():
            for kind, fragments in by_kind.items():
                for f in fragments:
                    if f.data.numel():
                        tensors[f"{network}/{kind}/{f.name}"] = f.data
                        layout[f"{network}/{kind}/{f.name}"] = (f.start, f.data.numel())
        self._share.choose(tensors)
        state = None
        if self._workers.is_first:
            # Cloned at once: some move as soon as the next update begins (spectral-norm vectors), and all are small.
            self._shared.choose({f"{n}.{k}": b.clone() for n, e in engines.items() for k, b in e.buffers().items()})
            state = {
                "nimg": clock.nimg,
                "iteration": clock.iteration,
                "identity": vars(identity),
                "system": copy.deepcopy(dict(system_state)),  # written when training has gone on
                "optimizer_steps": {n: e.optimizer_steps() for n, e in engines.items()},
                "state_keys": {n: sorted(k[6:] for k in by if k.startswith("state.")) for n, by in kinds.items()},
                "workers": self._workers.size,
                "zero_stage": {n: e.zero_stage for n, e in engines.items()},
            }
        self._saving = Saving(
            final,
            aside,
            self._workers.rank,
            self._workers.size,
            self._share,
            layout,
            self._shared if self._workers.is_first else None,
            state,
            began,
        )
        if not self._spec.background:
            self.finish()

    def copied(self) -> None:
        """Wait until what is being saved may change: weights, optimizer states and averages.

        Not collective. Forward and backward passes change none of these, and need not wait.
        """
        if self._saving is not None:
            self._saving.wait_for_copy()

    def _make_aside(self, final: Path) -> tuple[Path, str | None]:
        """The directory to fill, and why it cannot be made."""
        aside = hidden_name(final)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            delete_stale(self.root)
            aside.mkdir()
        except OSError as e:
            return aside, reason(e)
        return aside, None

    def advance(self, stop: bool = False) -> bool:
        """Move the checkpoint being written on; once per iteration.

        Args:
            stop: whether this worker was asked to stop.

        Returns:
            Whether any worker was, as of the last call: the same answer on all workers.
        """
        spoke_of, self._spoke_of = self._spoke_of, self._saving
        saving = self._saving
        flags = (False, False) if saving is None else (saving.is_durable, saving.has_failed)
        stops, durable, failed = self._pulse.beat(stop, *flags)
        if self._workers.size == 1:
            spoke_of = saving
        if saving is not None and spoke_of is saving:
            if failed:
                self.finish()
            elif self._workers.is_first and durable == self._workers.size:
                saving.commit(self._ready, self._retain)
        return stops > 0

    def finish(self) -> None:
        """Wait until the checkpoint being written is complete, or has failed on all workers alike."""
        saving = self._saving
        if saving is None:
            return
        errors = [e for e in self._workers.gather(saving.share_written()) if e is not None]
        if not errors and self._workers.is_first:
            saving.commit(self._ready, self._retain)
            error = saving.committed()
            errors = [] if error is None else [error]
        errors = self._workers.from_first(errors)
        if self._workers.is_first:
            self._reports += saving.report("; ".join(errors) or None)
        self._saving = None

    def reports(self) -> list[SaveReport]:
        """How saving ended since the last call, on the first worker. Not collective."""
        if self._saving is not None and self._saving.is_over:
            self._reports += self._saving.report(self._saving.committed())
        done, self._reports = self._reports, []
        return done

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call, as fields of journal events, on the first worker. Not collective."""
        uploads = self._uploads.events() if self._uploads is not None else []
        return [report.event() for report in self.reports()] + uploads

    def await_uploads(self, seconds: float) -> None:
        """Wait until the last checkpoint is in the store, or the time is over."""
        if self._spec.upload is not None:
            uploads = self._uploads
            self._workers.await_first(lambda: uploads.wait(seconds) if uploads is not None else None)

    def _retain(self, newest: Path) -> None:
        """Delete checkpoints that no policy wants. A failure here takes nothing from the one just written."""
        if self._uploads is not None:
            self._uploads.due(newest)
        try:
            self._damaged.discard(newest)
            sound = [p for p in self.complete() if p == newest or self._is_sound(p)]
            for old in expendable(sound, newest, self._spec, self._scores(), self._undecided()):
                if self._uploads is None or old not in self._uploads.needed:
                    delete_checkpoint(old)
        except Exception:
            _log.exception("old checkpoints could not be deleted")

    def _is_sound(self, path: Path) -> bool:
        return path not in self._damaged and damage(path, content=False) is None

    def find(self, latest: int | None = None) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint (until image `latest`), and why newer ones were skipped."""
        self.finish()
        return self._workers.await_first(lambda: self._look(latest))

    def _look(self, latest: int | None) -> tuple[Path | None, list[str]]:
        path, wrong = newest_undamaged(self.root, latest)
        self._damaged |= wrong.keys()
        reasons = list(wrong.values())
        if self._uploads is not None:
            path, more = self._uploads.fetch_newer(path, latest)
            self._damaged -= {path}
            reasons += more
        return path, reasons

    def forget_after(self, nimg: int) -> None:
        """Delete checkpoints beyond `nimg`: the run went back there, and takes another way."""
        self.finish()
        if self._workers.is_first:
            if self._uploads is not None:
                self._uploads.forget_after(nimg)
            for path in self.complete():
                if path.name > kimg_name(nimg):
                    delete_checkpoint(path)
        self._workers.barrier()

    @torch.no_grad()
    def restore(
        self,
        path: Path,
        identity: Identity,
        engines: Mapping[str, NetworkEngine],
        emas: Mapping[str, ShardedEma],
    ) -> tuple[Clock, dict[str, Any]]:
        """Load a checkpoint into the engines, at any number of workers and any stage from 0 to 2.

        Returns:
            The image clock and the system's own state.

        Raises:
            CheckpointError: the checkpoint is of another run, or lacks something.
        """
        state = read_state(path)
        identity.check(state["identity"], path)
        stored = StoredFragments(path, state["fragments"])
        shared = load_file(path / SHARED)
        for network, engine in engines.items():
            engine.allocate_state(state["state_keys"][network], state["optimizer_steps"][network])
            # ZeRO 0 replicates: every worker needs all of the weights, not only its share.
            kinds = self._whole(engine) if engine.zero_stage == 0 else self._kinds(engine)
            if network in emas:
                kinds |= emas[network].kinds()
            for kind, fragments in kinds.items():
                for fragment in fragments:
                    stored.fill(f"{network}/{kind}/{fragment.name}", fragment)
            engine.restored()
            for key, buffer in engine.buffers().items():
                buffer.copy_(shared[f"{network}.{key}"])
        self._workers.barrier()
        return Clock(nimg=state["nimg"], iteration=state["iteration"]), state["system"]

    @staticmethod
    def _kinds(engine: NetworkEngine, ema: ShardedEma | None = None) -> dict[str, list[Fragment]]:
        """This worker's fragments by kind: weights, optimizer states, averages."""
        states = {f"state.{key}": fragments for key, fragments in engine.state_fragments().items()}
        return {"weight": engine.fragments(), **states, **(ema.kinds() if ema is not None else {})}

    @staticmethod
    def _whole(engine: NetworkEngine) -> dict[str, list[Fragment]]:
        """Fragments that span whole tensors, for ZeRO 0."""
        out: dict[str, list[Fragment]] = {}
        for name, p in engine.module.named_parameters():
            out.setdefault("weight", []).append(Fragment.share(name, p.data, 0, 1))
            for key, value in engine.torch_optimizer.state.get(p, {}).items():
                if value.shape == p.shape:
                    out.setdefault(f"state.{key}", []).append(Fragment.share(name, value, 0, 1))
        return out
