"""Snapshots: averaged weights for people, as safetensors beside a JSON file that says what they are.

``<run>/snapshots/kimg-000012.800/{weights.safetensors, snapshot.json}``. A snapshot holds the networks that
sampling needs, whole and in fp32; a checkpoint (sharded, with optimizer states) is for resuming.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.errors import CheckpointError
from bessemer.files import file_sha256, hidden_name, sync
from bessemer.systems.contract import System
from bessemer.systems.registry import rebuild

__all__ = [
    "SnapshotInfo",
    "fill_networks",
    "is_snapshot",
    "load_snapshot",
    "newest_snapshot",
    "read_snapshot_info",
    "sampled_state",
    "save_snapshot",
    "snapshot_dirs",
    "system_of",
    "verified_weights",
]

_WEIGHTS = "weights.safetensors"
_INFO = "snapshot.json"


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot says of itself."""

    system: str
    config: dict[str, Any]
    """The whole system configuration, so that nothing else is needed to rebuild the networks."""
    nimg: int
    ema: dict[str, Any]
    """EMA profile: `half_life_kimg` and `rampup`, or `sigma_rel`; and `batch_norm` unless it was copied."""
    seed: int
    data_hash: str
    class_names: list[str]
    class_counts: list[int]
    weights_sha256: str = ""


def save_snapshot(directory: Path, tensors: dict[str, Tensor], info: SnapshotInfo) -> SnapshotInfo:
    """Write a snapshot so that it is either whole or not there.

    Args:
        directory: the snapshot's own directory; replaced if it exists.
        tensors: `<network>.<state_dict key>` -> tensor, parameters and buffers.
    """
    aside = hidden_name(directory)
    aside.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, aside / _WEIGHTS)
    info = SnapshotInfo(**{**asdict(info), "weights_sha256": file_sha256(aside / _WEIGHTS)})
    (aside / _INFO).write_text(json.dumps(asdict(info), indent=2) + "\n")
    for path in (aside / _WEIGHTS, aside / _INFO):
        sync(path)
    if directory.exists():
        shutil.rmtree(directory)
    aside.rename(directory)
    return info


def read_snapshot_info(directory: Path) -> SnapshotInfo:
    """Read `snapshot.json`.

    Raises:
        CheckpointError: the directory holds no readable snapshot.
    """
    try:
        return SnapshotInfo(**json.loads((directory / _INFO).read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{directory}: not a snapshot ({e}); expected {_INFO} and {_WEIGHTS}.") from None


def is_snapshot(directory: Path) -> bool:
    """Whether `directory` holds a snapshot; they are written whole or not at all."""
    return (directory / _INFO).is_file()


def verified_weights(directory: Path, info: SnapshotInfo) -> Path:
    """The file with a snapshot's tensors, its checksum compared.

    Raises:
        CheckpointError: missing or damaged.
    """
    weights = directory / _WEIGHTS
    if not weights.is_file() or file_sha256(weights) != info.weights_sha256:
        raise CheckpointError(f"{weights}: missing or damaged (sha256 differs from {_INFO}); use another snapshot.")
    return weights


def load_snapshot(directory: Path, device: str = "cpu") -> tuple[System, SnapshotInfo]:
    """Rebuild the system with the snapshot's weights, in eval mode.

    Raises:
        CheckpointError: missing, damaged, or of a system that this version does not know.
    """
    info = read_snapshot_info(directory)
    weights = verified_weights(directory, info)
    return system_of(info, load_file(weights, device=device), device), info


def system_of(info: SnapshotInfo, tensors: Mapping[str, Tensor], device: str = "cpu") -> System:
    """The system that `info` describes, its sampled networks filled from `tensors` and in eval mode."""
    system = rebuild(info.system, info.config)
    fill_networks(system, tensors)
    for name in system.sampled_networks:
        system.networks()[name].to(device).eval()
    return system


def fill_networks(system: System, tensors: Mapping[str, Tensor]) -> None:
    """Load ``<network>.<key>`` -> tensor into the networks that sampling needs."""
    for name in system.sampled_networks:
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        system.networks()[name].load_state_dict(own)


def sampled_state(system: System) -> dict[str, Tensor]:
    """``<network>.<key>`` -> parameters and buffers of the networks that sampling needs, live."""
    networks = system.networks()
    return {f"{n}.{k}": t for n in system.sampled_networks for k, t in networks[n].state_dict().items()}


def snapshot_dirs(run: Path) -> list[Path]:
    """All complete snapshots of a run, oldest first."""
    return sorted(p for p in (run / "snapshots").glob("kimg-*") if is_snapshot(p))


def newest_snapshot(run: Path) -> Path:
    """The newest snapshot of a run.

    Raises:
        CheckpointError: the run has none yet.
    """
    found = snapshot_dirs(run)
    if not found:
        raise CheckpointError(f"{run}: has no snapshot yet; they are written at each evaluation and at the end.")
    return found[-1]
