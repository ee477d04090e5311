"""What a checkpoint is on disk: its files, its manifest, and how it is read and checked.

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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.errors import CheckpointError
from bessemer.files import file_sha256, hidden_name, write_synced

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SHARED",
    "STATE",
    "CheckpointInfo",
    "all_checkpoints",
    "complete_checkpoints",
    "damage",
    "delete_checkpoint",
    "delete_stale",
    "describe",
    "kimg_name",
    "newest_undamaged",
    "nimg_of",
    "read_state",
    "verify_checkpoint",
    "write_json",
]

MANIFEST = "manifest.json"
STATE = "state.json"
SHARED = "shared.safetensors"
FORMAT = 1


def kimg_name(nimg: int) -> str:
    """Directory and file stem of a moment on the image clock: ``kimg-000012.800``. Sorts by time."""
    return f"kimg-{nimg / 1000:010.3f}"


def nimg_of(path: Path) -> int:
    """The moment that :func:`kimg_name` put into a name."""
    return round(float(path.name.removeprefix("kimg-")) * 1000)


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first; whether they are damaged is another question."""
    return sorted(p for p in root.glob("kimg-*") if (p / MANIFEST).is_file())


def all_checkpoints(root: Path) -> list[Path]:
    """Every visible checkpoint, also one that lost its manifest, oldest first."""
    return sorted(p for p in root.glob("kimg-*") if p.is_dir())


def write_json(path: Path, value: Any, indent: int | None = None) -> dict[str, Any]:
    """Write and fsync a JSON file.

    Returns:
        Its entry of the manifest: `bytes` and `sha256`.

    Raises:
        OSError: with the file's name.
    """
    data = json.dumps(value, indent=indent).encode()
    try:
        write_synced(path, data)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def delete_stale(root: Path) -> None:
    """Delete what runs that were killed while saving or deleting left behind."""
    for stale in root.glob(".kimg-*"):
        shutil.rmtree(stale, ignore_errors=True)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a half-deleted one is never visible."""
    aside = hidden_name(path)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def verify_checkpoint(path: Path, *, content: bool = True) -> None:
    """Check a checkpoint against its manifest.

    Args:
        path: its directory.
        content: check every byte; otherwise only that all files are there in their full length, which is quick.

    Raises:
        CheckpointError: something is missing or damaged; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']} is not known to this version ({FORMAT}).")
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing.")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(
                    f"{file}: has {file.stat().st_size} bytes, the manifest says {expected['bytes']}."
                )
            if content and file_sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file}: sha256 differs from the manifest.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({e!r}).") from None


def damage(path: Path, *, content: bool = True) -> str | None:
    """What :func:`verify_checkpoint` finds wrong, or None."""
    try:
        verify_checkpoint(path, content=content)
    except CheckpointError as e:
        return str(e)
    return None


def newest_undamaged(root: Path, latest: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, every byte checked, and what is wrong with those that are newer.

    Args:
        root: directory of the checkpoints.
        latest: images; newer ones are left out.
    """
    wrong: dict[Path, str] = {}
    for path in reversed(complete_checkpoints(root)):
        if latest is not None and path.name > kimg_name(latest):
            continue
        found = damage(path)
        if found is None:
            return path, wrong
        wrong[path] = found
    return None, wrong


def read_state(path: Path) -> Mapping[str, Any]:
    """What `state.json` of a checkpoint says.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path / STATE}: cannot be read ({e}).") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: holds no object.")
    return state


@dataclass(frozen=True)
class CheckpointInfo:
    """What can be said of a checkpoint without reading its tensors; None where it does not say."""

    name: str
    kimg: float | None
    bytes: int
    """Size of all its files."""
    workers: int | None
    """Workers that wrote it."""
    zero_stage: int | None
    """ZeRO stage of its first network."""
    damage: str | None
    """What is missing or damaged; None if it is whole."""


def describe(path: Path, *, content: bool = False) -> CheckpointInfo:
    """Describe a checkpoint.

    Args:
        path: its directory.
        content: check every byte of it; otherwise only names and sizes of its files.
    """
    wrong = damage(path, content=content)
    nimg = workers = stage = None
    try:
        state = read_state(path)
        nimg, workers = int(state["nimg"]), int(state["workers"])
        stage = int(next(iter(state["zero_stage"].values())))
    except (CheckpointError, KeyError, TypeError, ValueError, StopIteration, AttributeError) as e:
        wrong = wrong or f"{path / STATE}: cannot be read ({e!r})."
    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    return CheckpointInfo(path.name, None if nimg is None else nimg / 1000, size, workers, stage, wrong)
