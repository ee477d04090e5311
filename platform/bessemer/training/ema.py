"""Moving averages of weights, sharded over the workers like the weights themselves.

Each network that is sampled has one main average (an exponential one, from which samples and evaluations are drawn)
and one for each of the job's power-function profiles. What is no parameter has no average: buffers are those of the
live network. Spectral-norm vectors are right as they are, because :class:`~bessemer.nn.spectral.SpectralNorm` computes
σ from them and whatever weights it holds; for BatchNorm statistics see :class:`~bessemer.spec.job.EmaSpec`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bessemer.spec.job import EmaSpec
from bessemer.training.distributed import Workers
from bessemer.training.engine import NetworkEngine
from bessemer.training.fragments import Fragment, gather_full
from bessemer.training.power_function import exponent, power_beta

__all__ = ["MAIN", "ShardedEma", "ema_beta", "profile_kind"]

MAIN = "ema"
"""The main average's kind in checkpoints."""


def profile_kind(sigma_rel: float) -> str:
    """A power-function average's kind in checkpoints: ``ema.0.05``."""
    return f"ema.{sigma_rel:g}"


def ema_beta(spec: EmaSpec, images: int, nimg: int) -> float:
    """Weight of the old main average after `images` more images.

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


def _betas(spec: EmaSpec) -> dict[str, Callable[[int, int], float]]:
    """Kind -> weight of the old average after (images, nimg)."""

    def power(sigma_rel: float) -> Callable[[int, int], float]:
        gamma = exponent(sigma_rel)
        return lambda images, nimg: power_beta(gamma, images, nimg)

    main = {MAIN: lambda images, nimg: ema_beta(spec, images, nimg)}
    return main | {profile_kind(sigma_rel): power(sigma_rel) for sigma_rel in spec.profiles}


class ShardedEma:
    """The averages of one network. Each worker averages only its own fragments: no communication."""

    def __init__(self, engine: NetworkEngine, spec: EmaSpec, workers: Workers) -> None:
        self._engine, self._workers = engine, workers
        self._live = engine.fragments()
        self._betas = _betas(spec)
        self._averages = {kind: [f.data.detach().clone() for f in self._live] for kind in self._betas}

    @torch.no_grad()
    def update(self, images: int, nimg: int) -> None:
        """Move all averages towards the live weights, `images` after `nimg`."""
        if self._live:
            live = [f.data for f in self._live]
            for kind, average in self._averages.items():
                torch._foreach_lerp_(average, live, 1 - self._betas[kind](images, nimg))

    def kinds(self) -> dict[str, list[Fragment]]:
        """Kind -> this worker's share of that average, as live views."""
        return {
            kind: [f.with_data(a) for f, a in zip(self._live, average, strict=True)]
            for kind, average in self._averages.items()
        }

    def full_state(self, kind: str = MAIN) -> dict[str, Tensor]:
        """State dict with averaged parameters and copied buffers, on every worker. Collective."""
        shapes = self._engine.shapes
        parameters = gather_full(self.kinds()[kind], shapes, self._workers)
        return {**parameters, **{name: b.detach().clone() for name, b in self._engine.buffers().items()}}
