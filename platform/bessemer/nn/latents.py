"""Latents drawn from a generator that is handed in."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

__all__ = ["normal_latents"]


def normal_latents(shape: tuple[int, ...], generator: Generator, truncation: float | None = None) -> Tensor:
    """Draws z ~ N(0, 1), float32 on the generator's device.

    Args:
        shape: of the result.
        generator: source of randomness.
        truncation: t > 0: entries with |z| > t are redrawn until they fall inside (BigGAN, section 3.1). Computed by
            the distribution function and the inverse of the truncated one, which gives the same distribution in one
            pass for any t, and keeps the order: one state of the generator is one latent, more or less truncated.
    """
    z = torch.randn(shape, generator=generator, device=generator.device)
    if truncation is None:
        return z
    # In double precision: 1 - erf(t/√2) must not round to 0, or its inverse would be infinite. Beyond t = 8 it does.
    bound = math.erf(min(truncation, 8.0) / math.sqrt(2))
    inside = math.sqrt(2) * torch.erfinv(torch.erf(z.double() / math.sqrt(2)) * bound)
    return inside.clamp(-truncation, truncation).float()
