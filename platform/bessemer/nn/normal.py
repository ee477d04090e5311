"""Diagonal normal distributions with bounded parameters, as deep hierarchical VAEs need them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["Normal", "residual", "soft_clamp"]

_BOUND = 5.0
_LEAST_SIGMA = 1e-2  # keeps KL and gradients finite where a posterior wants to become a point


def soft_clamp(x: Tensor) -> Tensor:
    """5·tanh(x/5): the identity near 0, bounded by ±5, and differentiable everywhere."""
    return torch.tanh(x / _BOUND) * _BOUND


@dataclass(frozen=True)
class Normal:
    """N(μ, σ²), independent for each element."""

    mu: Tensor
    sigma: Tensor
    """Greater than 0."""

    @staticmethod
    def bounded(mu: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> Normal:
        """A normal whose μ and log σ are softly bounded by ±5 and whose σ is at least 0.01, in float32 or more.

        Args:
            mu: unbounded mean.
            log_sigma: unbounded logarithm of σ.
            temperature: what σ is multiplied by.
        """
        mu, log_sigma = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (mu, log_sigma))
        return Normal(soft_clamp(mu), (soft_clamp(log_sigma).exp() + _LEAST_SIGMA) * temperature)

    def at(self, noise: Tensor) -> Tensor:
        """μ + σε for the noise ε of N(0, 1): a draw with gradients for μ and σ."""
        return torch.addcmul(self.mu, self.sigma, noise.to(self.mu.dtype))

    def sample(self, generator: Generator) -> Tensor:
        """:meth:`at` for noise from the generator."""
        return self.at(torch.randn(self.mu.shape, generator=generator, device=generator.device))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density N(z; μ, σ²) of each element, in nats."""
        return -0.5 * ((z - self.mu) / self.sigma).square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: Normal) -> Tensor:
        """KL(self ‖ other) of each element, in nats."""
        ratio = self.sigma / other.sigma
        shift = (self.mu - other.mu) / other.sigma
        return 0.5 * (shift.square() + ratio.square() - 1) - ratio.log()


def residual(prior: Tensor, change: Tensor) -> Normal:
    """The posterior N(μ + Δμ, (σ·Δσ)²) relative to the prior N(μ, σ²) (NVAE, section 3.2), bounded after the sum.

    Args:
        prior: unbounded μ and log σ, [N, 2C, H, W].
        change: Δμ and log Δσ, likewise.
    """
    mu, log_sigma = (prior + change).chunk(2, dim=1)
    return Normal.bounded(mu, log_sigma)
