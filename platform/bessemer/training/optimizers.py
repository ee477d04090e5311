"""The optimizer of a network: the paper's settings, the job's overrides, the correction for lazy regularisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bessemer.errors import SpecError
from bessemer.spec.job import OptimizerSpec
from bessemer.systems.contract import OptimizerDefaults, Update
from bessemer.training.large_batch import LAMB, LARS

__all__ = ["build_optimizer", "lazy_correction"]

_ALGORITHMS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "lamb": LAMB,
    "lars": LARS,
}
_SETTINGS = {
    "adam": ("betas", "eps"),
    "adamax": ("betas", "eps"),
    "rmsprop": ("momentum", "eps"),
    "sgd": ("momentum",),
    "lamb": ("betas", "eps"),
    "lars": ("momentum", "trust"),
}
"""Which settings besides lr and weight_decay an algorithm has."""


def lazy_correction(updates: Sequence[Update], network: str) -> float:
    """Share of main steps among all steps of a network, 1 where it has no lazy regulariser.

    A lazy regulariser steps the same optimizer. With one main step per iteration and one regulariser every k of them
    this is c = k/(k + 1) of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958, appendix B).
    """
    own = [u for u in updates if u.network == network]
    main = sum(u.repeats / u.interval for u in own if not u.lazy)
    lazy = sum(u.repeats / u.interval for u in own if u.lazy)
    return main / (main + lazy) if main and lazy else 1.0


def build_optimizer(
    network: str,
    module: nn.Module,
    base: OptimizerDefaults,
    own: OptimizerSpec,
    correction: float = 1.0,
    *,
    offloaded: bool = False,
) -> torch.optim.Optimizer:
    """The paper's optimizer with the job's overrides.

    Args:
        network: name for messages.
        module: whose parameters are optimised.
        base: the paper's settings.
        own: the job's overrides.
        correction: c of :func:`lazy_correction`: the learning rate is multiplied by it, decay rates become β^c.
        offloaded: the CPU will compute the steps.

    Raises:
        SpecError: the job sets what the algorithm does not have.
    """
    chosen = own.model_dump(exclude_none=True)
    name = chosen.pop("name", base.name)
    for setting in chosen:
        if setting not in ("lr", "weight_decay", *_SETTINGS[name]):
            raise SpecError(
                f"training.optimizers.{network}.{setting}: {name} has no {setting}; remove the field "
                f"(it has lr, weight_decay, {', '.join(_SETTINGS[name])})."
            )
    settings: dict[str, Any] = {"lr": base.lr, "weight_decay": base.weight_decay}
    settings |= {key: getattr(base, key) for key in _SETTINGS[name]} | chosen
    # YAML gives ints for 0 and 1; torch refuses a mix of ints and floats.
    settings["lr"] = float(settings["lr"]) * correction
    if "betas" in settings:
        settings["betas"] = tuple(float(b) ** correction for b in settings["betas"])
    if "momentum" in settings:
        settings["momentum"] = float(settings["momentum"]) ** correction
    if name == "rmsprop":
        settings["alpha"] = 0.99**correction
    if name == "adam" and offloaded:
        settings["fused"] = True  # one pass over memory, which is what the CPU waits for; without, nine times as long
    return _ALGORITHMS[name]([p for p in module.parameters() if p.requires_grad], **settings)
