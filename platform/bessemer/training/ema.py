"""Exponential moving averages of weights, sharded over the workers like the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.spec.job import EmaSpec
from bessemer.training.distributed import Workers
from bessemer.training.engine import NetworkEngine
from bessemer.training.fragments import Fragment, gather_full

__all__ = ["ShardedEma", "ema_beta"]


def ema_beta(spec: EmaSpec, images: int, nimg: int) -> float:
    """Weight of the old average after `images` more images.

    The half-life is in images, so it means the same at every batch size. Early in a run it is at most
    `rampup * nimg`, so that the random initial weights are soon forgotten (Karras et al., StyleGAN2-ADA, 2020).

    Args:
        spec: the average's profile.
        images: images seen since the last update.
        nimg: images seen before them.
    """
    half_life = spec.half_life_kimg * 1000
    if spec.rampup is not None:
        half_life = min(half_life, spec.rampup * nimg)
    beta: float = 0.5 ** (images / max(half_life, 1e-8))
    return beta


class ShardedEma:
    """The average of one network. Each worker averages only its own fragments: no communication."""

    def __init__(self, engine: NetworkEngine, spec: EmaSpec, workers: Workers) -> None:
        self._engine, self._spec, self._workers = engine, spec, workers
        self._live = engine.fragments()
        self._average = [f.data.detach().clone() for f in self._live]

    @torch.no_grad()
    def update(self, images: int, nimg: int) -> None:
        """Move towards the live weights; see :func:`ema_beta`."""
        if self._average:
            weight = 1 - ema_beta(self._spec, images, nimg)
            torch._foreach_lerp_(self._average, [f.data for f in self._live], weight)

    def fragments(self) -> list[Fragment]:
        """This worker's share of the average, as live views."""
        return [f.with_data(a) for f, a in zip(self._live, self._average, strict=True)]

    def full_state(self) -> dict[str, Tensor]:
        """State dict with averaged parameters and copied buffers, on every worker. Collective."""
        shapes = {name: p.shape for name, p in self._engine.module.named_parameters()}
        parameters = gather_full(self.fragments(), shapes, self._workers)
        return {**parameters, **{name: b.detach().clone() for name, b in self._engine.buffers().items()}}
