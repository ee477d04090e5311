"""Checkpoints: every worker writes its own fragments; a manifest with checksums is written last.

::

    checkpoints/kimg-000012.800/
        rank-00000.safetensors   fragments of weights, optimizer state and averages, by "<network>/<kind>/<name>"
        shared.safetensors       buffers, which are equal on all workers
        state.json               image clock, system state, optimizer step counts, where each fragment lies
        manifest.json            bytes and sha256 of each file; written last

The directory is filled under a hidden name and renamed when it is complete, so what is visible is whole. Because
fragments say where they lie, a checkpoint restores on any number of workers and at any of the stages 0, 1, 2.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.errors import CheckpointError
from bessemer.systems.contract import Clock
from bessemer.training.distributed import Workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import NetworkEngine
from bessemer.training.fragments import Fragment

__all__ = ["CheckpointStore", "Identity", "kimg_name", "verify_checkpoint"]

_MANIFEST = "manifest.json"
_STATE = "state.json"
_SHARED = "shared.safetensors"
_FORMAT = 1


def kimg_name(nimg: int) -> str:
    """Directory and file stem of a moment on the image clock: ``kimg-000012.800``. Sorts by time."""
    return f"kimg-{nimg / 1000:010.3f}"


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


def _sha256(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            h.update(block)
    return h.hexdigest()


def _sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def verify_checkpoint(path: Path) -> None:
    """Check every byte of a checkpoint against its manifest.

    Raises:
        CheckpointError: something is missing or damaged; the message names it.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = dict(manifest["files"])
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']} is not known to this version ({_FORMAT}).")
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing.")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(
                    f"{file}: has {file.stat().st_size} bytes, the manifest says {expected['bytes']}."
                )
            if _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file}: sha256 differs from the manifest.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path / _MANIFEST}: cannot be read ({e!r}).") from None


class _Fragments:
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
    """The checkpoints of one run. All methods but :meth:`complete` are collective."""

    def __init__(self, root: Path, keep_last: int, workers: Workers) -> None:
        self.root, self._keep_last, self._workers = root, keep_last, workers

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.root.glob("kimg-*") if (p / _MANIFEST).is_file())

    def save(
        self,
        clock: Clock,
        identity: Identity,
        engines: Mapping[str, NetworkEngine],
        emas: Mapping[str, ShardedEma],
        system_state: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and delete the oldest ones beyond `keep_last`."""
        final = self.root / kimg_name(clock.nimg)
        aside = Path(self._workers.from_first(str(self.root / f".{final.name}.{uuid.uuid4().hex[:8]}")))
        if self._workers.is_first:
            self.root.mkdir(parents=True, exist_ok=True)
            for stale in self.root.glob(".kimg-*"):  # left by a run that was killed while saving
                shutil.rmtree(stale, ignore_errors=True)
            aside.mkdir()
        self._workers.barrier()

        file = f"rank-{self._workers.rank:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        layout: dict[str, tuple[int, int]] = {}
        for key, fragment in self._keyed_fragments(engines, emas):
            if fragment.data.numel():
                tensors[key] = fragment.data.detach().cpu().clone()
                layout[key] = (fragment.start, fragment.data.numel())
        # save_file writes no empty file that safe_open accepts, so even an idle worker stores something
        save_file(tensors or {"empty": torch.zeros(1)}, aside / file)
        _sync(aside / file)
        written = {file: {"bytes": (aside / file).stat().st_size, "sha256": _sha256(aside / file)}}
        shares = self._workers.gather((file, layout, written))

        if self._workers.is_first:
            buffers = {f"{n}.{k}": b for n, e in engines.items() for k, b in e.buffers().items()}
            save_file(
                {k: b.detach().cpu().clone() for k, b in buffers.items()} or {"empty": torch.zeros(1)}, aside / _SHARED
            )
            where: dict[str, list[tuple[str, str, int, int]]] = {}
            for name, keys, _ in shares:
                for key, (start, numel) in keys.items():
                    where.setdefault(key, []).append((name, key, start, numel))
            state = {
                "nimg": clock.nimg,
                "iteration": clock.iteration,
                "identity": vars(identity),
                "system": dict(system_state),
                "optimizer_steps": {n: e.optimizer_steps() for n, e in engines.items()},
                "state_keys": {n: sorted(e.state_fragments()) for n, e in engines.items()},
                "workers": self._workers.size,
                "zero_stage": {n: e.zero_stage for n, e in engines.items()},
                "fragments": where,
            }
            (aside / _STATE).write_text(json.dumps(state))
            files = {k: v for _, _, share in shares for k, v in share.items()}
            for name in (_SHARED, _STATE):
                _sync(aside / name)
                files[name] = {"bytes": (aside / name).stat().st_size, "sha256": _sha256(aside / name)}
            (aside / _MANIFEST).write_text(
                json.dumps({"format": _FORMAT, "nimg": clock.nimg, "files": files}, indent=1)
            )
            _sync(aside / _MANIFEST)
            _sync(aside)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            _sync(self.root)
            for old in self.complete()[: -self._keep_last]:
                shutil.rmtree(old, ignore_errors=True)
        self._workers.barrier()
        return final

    @staticmethod
    def _keyed_fragments(
        engines: Mapping[str, NetworkEngine], emas: Mapping[str, ShardedEma]
    ) -> list[tuple[str, Fragment]]:
        out = []
        for network, engine in engines.items():
            kinds = CheckpointStore._shares(engine)
            if network in emas:
                kinds |= emas[network].kinds()
            out += [(f"{network}/{kind}/{f.name}", f) for kind, fragments in kinds.items() for f in fragments]
        return out

    def find(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, and why newer ones were skipped."""
        found: tuple[Path | None, list[str]] = (None, [])
        if self._workers.is_first:
            skipped = []
            for path in reversed(self.complete()):
                try:
                    verify_checkpoint(path)
                except CheckpointError as e:
                    skipped.append(str(e))
                else:
                    found = (path, skipped)
                    break
            else:
                found = (None, skipped)
        result: tuple[Path | None, list[str]] = self._workers.from_first(found)
        return result

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
        state = json.loads((path / _STATE).read_text())
        identity.check(state["identity"], path)
        stored = _Fragments(path, state["fragments"])
        shared = load_file(path / _SHARED)
        for network, engine in engines.items():
            engine.allocate_state(state["state_keys"][network], state["optimizer_steps"][network])
            # ZeRO 0 replicates: every worker needs all of the weights, not only its share.
            kinds = self._whole(engine) if engine.zero_stage == 0 else self._shares(engine)
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
    def _shares(engine: NetworkEngine) -> dict[str, list[Fragment]]:
        """This worker's fragments by kind."""
        return {"weight": engine.fragments(), **{f"state.{k}": v for k, v in engine.state_fragments().items()}}

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
