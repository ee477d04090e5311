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
            inverting the distribution function, which gives the same distribution in one pass for any t.
    """
    device = generator.device
    if truncation is None:
        return torch.randn(shape, generator=generator, device=device)
    # In double precision: 1 - erf(t/√2) must not round to 0, or its inverse would be infinite. Beyond t = 8 it does.
    bound = math.erf(min(truncation, 8.0) / math.sqrt(2))
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    z = math.sqrt(2) * torch.erfinv((2 * uniform - 1) * bound)
    return z.clamp(-truncation, truncation).float()
