"""Averaged weights out of a checkpoint, without its workers: for people who want a snapshot of that moment."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bessemer.errors import CheckpointError
from bessemer.systems.contract import System
from bessemer.systems.registry import rebuild
from bessemer.training.checkpoint import StoredFragments
from bessemer.training.checkpoint_files import SHARED, read_state
from bessemer.training.fragments import Fragment

__all__ = ["averaged_weights", "stored_system"]


def stored_system(path: Path) -> System:
    """The system that a checkpoint is of, on the meta device.

    Raises:
        CheckpointError: it does not say, or says what this version does not know.
    """
    try:
        identity = read_state(path)["identity"]
        with torch.device("meta"):
            return rebuild(identity["system"], identity["config"])
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: does not say which system it is of ({e}).") from None


def averaged_weights(path: Path, system: System) -> dict[str, Tensor]:
    """The moving averages that sampling needs, and the buffers, put together from all workers' fragments.

    Args:
        path: a whole checkpoint.
        system: of the checkpoint's configuration, on any device.

    Returns:
        ``<network>.<state_dict key>`` -> tensor on the CPU, the same that an evaluation at this moment saw.

    Raises:
        CheckpointError: the checkpoint lacks something.
    """
    stored = StoredFragments(path, read_state(path)["fragments"])
    shared = load_file(path / SHARED)
    weights: dict[str, Tensor] = {}
    for network in system.sampled_networks:
        for name, parameter in system.networks()[network].named_parameters():
            whole = torch.empty(parameter.shape)
            stored.fill(f"{network}/ema/{name}", Fragment.share(name, whole, 0, 1))
            weights[f"{network}.{name}"] = whole
        weights |= {key: buffer for key, buffer in shared.items() if key.startswith(f"{network}.")}
    return weights
