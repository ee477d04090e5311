"""Systems whose images are functions of one vector z ~ N(0, I)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Generator, Tensor

from bessemer.nn.latents import normal_latents
from bessemer.systems.contract import System

__all__ = ["LatentSystem"]


class _LatentConfig(Protocol):
    @property
    def latent_dim(self) -> int: ...


class LatentSystem(System):
    """A system with :meth:`~bessemer.systems.contract.System.generate` from z, [N, `config.latent_dim`] float32."""

    config: _LatentConfig  # type: ignore[assignment]

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"latents": (self.config.latent_dim,)}

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw images; `truncation` t redraws the entries of z beyond ±t."""
        z = normal_latents((len(labels), self.config.latent_dim), generator, truncation)
        return self.generate({"latents": z}, labels)
