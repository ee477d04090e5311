"""Stored power-function averages, and the reconstruction of others from them.

::

    <run>/ema/sigma-0.05/kimg-000012.800/{weights.safetensors, snapshot.json}

Each stored average is a snapshot of its own (:mod:`bessemer.systems.snapshot`): whole, in fp32, with a checksum, and
fit to draw samples from. Karras et al., CVPR 2024, arXiv:2312.02696, section 3.2, combine them after the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bessemer.errors import CheckpointError
from bessemer.systems.contract import Clock
from bessemer.systems.registry import rebuild
from bessemer.systems.snapshot import SnapshotInfo, is_snapshot, read_snapshot_info, save_snapshot, verified_weights
from bessemer.training.checkpoint_files import kimg_name
from bessemer.training.distributed import Workers
from bessemer.training.ema import ShardedEma, profile_kind
from bessemer.training.power_function import Combination, Profiles, combine, exponent

__all__ = ["EmaStore", "Reconstruction", "reconstruct", "stored_averages"]


class EmaStore:
    """Writes the profiles of a run while it trains. All methods are collective.

    Args:
        root: the run's ``ema`` directory.
        sigma_rels: the profiles.
        info: what every snapshot of this run says of itself.
        workers: the group.
    """

    def __init__(self, root: Path, sigma_rels: tuple[float, ...], info: SnapshotInfo, workers: Workers) -> None:
        self._root, self._sigma_rels, self._info, self._workers = root, sigma_rels, info, workers

    def save(self, clock: Clock, emas: Mapping[str, ShardedEma]) -> None:
        """Store every profile as it stands."""
        for sigma_rel in self._sigma_rels:
            kind = profile_kind(sigma_rel)
            tensors = {f"{n}.{k}": t for n, ema in emas.items() for k, t in ema.full_state(kind).items()}
            if self._workers.is_first:
                info = replace(self._info, nimg=clock.nimg, ema={"sigma_rel": sigma_rel})
                save_snapshot(self._root / f"sigma-{sigma_rel:g}" / kimg_name(clock.nimg), tensors, info)
        self._workers.barrier()

    def forget_after(self, nimg: int) -> None:
        """Delete what was stored beyond `nimg`: the run went back there, and may take another way from there."""
        if self._workers.is_first:
            for path, info in stored_averages(self._root):
                if info.nimg > nimg:
                    shutil.rmtree(path)
        self._workers.barrier()


def stored_averages(root: Path) -> list[tuple[Path, SnapshotInfo]]:
    """All stored averages below a run's ``ema`` directory, by width and time."""
    paths = sorted(p for p in root.glob("sigma-*/kimg-*") if is_snapshot(p))
    return [(p, read_snapshot_info(p)) for p in paths]


@dataclass(frozen=True)
class Reconstruction:
    """An average that was not kept during training."""

    tensors: dict[str, Tensor]
    """Averaged weights, fp32, and the buffers of the moment."""
    info: SnapshotInfo
    combination: Combination
    skipped: list[str]
    """Why stored averages were left out."""


def reconstruct(root: Path, sigma_rel: float, nimg: int | None = None) -> Reconstruction:
    """The power-function average of width `sigma_rel` at a stored moment, from all averages stored until then.

    Args:
        root: the run's ``ema`` directory.
        sigma_rel: wanted width, in (0, 0.2887).
        nimg: one of the stored moments; the last when unset.

    Raises:
        CheckpointError: nothing is stored, or not at that moment.
    """
    stored, skipped = [], []
    for path, info in stored_averages(root):
        try:
            stored.append((verified_weights(path, info), info))
        except CheckpointError as e:
            skipped.append(str(e))
    if not stored:
        raise CheckpointError(
            f"{root}: holds no stored average{' that is whole' if skipped else ''}; set ema.profiles to [0.05, 0.1] in "
            "the job before training."
        )
    moments = sorted({info.nimg for _, info in stored})
    at = moments[-1] if nimg is None else nimg
    if at not in moments:
        near = sorted(sorted(moments, key=lambda m: abs(m - at))[:2])
        raise CheckpointError(
            f"--at {at / 1000:g}: no average was stored then; the nearest moments are "
            f"{' and '.join(f'{m / 1000:g}' for m in near)} kimg, of {len(moments)}."
        )
    # Averages taken later hold weights that the wanted one must not see. One at nimg 0 is the initial weights.
    used = [(weights, info) for weights, info in stored if 0 < info.nimg <= at]
    wanted = Profiles(np.array([float(at)]), np.array([exponent(sigma_rel)]))
    combination = combine(
        Profiles(
            np.array([float(info.nimg) for _, info in used]),
            np.array([exponent(info.ema["sigma_rel"]) for _, info in used]),
        ),
        wanted,
    )
    last = next(i for i, (_, info) in enumerate(used) if info.nimg == at)
    profile: dict[str, Any] = {
        "sigma_rel": sigma_rel,
        "reconstructed_from": len(used),
        "residual": float(f"{combination.residual:.2g}"),
    }
    info = replace(used[last][1], ema=profile, weights_sha256="")
    files = [weights for weights, _ in used]
    tensors = _combined(files, combination.weights.tolist(), files[last], _parameters(info))
    return Reconstruction(tensors, info, combination, skipped)


def _parameters(info: SnapshotInfo) -> set[str]:
    """Keys of a snapshot's tensors that were averaged; the others are buffers."""
    with torch.device("meta"):
        system = rebuild(info.system, info.config)
    networks = system.networks()
    return {f"{n}.{key}" for n in system.sampled_networks for key, _ in networks[n].named_parameters()}


def _combined(files: list[Path], factors: list[float], last: Path, averaged: set[str]) -> dict[str, Tensor]:
    """Weighted sums of the averaged tensors, in float64; the others as they are in `last`."""
    handles: list[Any] = [safe_open(file, framework="pt") for file in files]
    tensors: dict[str, Tensor] = {}
    for key, own in load_file(last).items():
        if key not in averaged:
            tensors[key] = own
            continue
        total = torch.zeros_like(own, dtype=torch.float64)
        for handle, factor in zip(handles, factors, strict=True):
            total.add_(handle.get_tensor(key).double(), alpha=factor)
        tensors[key] = total.to(own.dtype)
    return tensors
