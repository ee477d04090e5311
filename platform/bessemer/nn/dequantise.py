"""Continuous densities for discrete pixels (Theis, van den Oord and Bethge 2016, arXiv:1511.01844, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from bessemer.nn.likelihoods import quantise

__all__ = ["dequantise", "log_volume", "undo_dequantise"]


def dequantise(images: Tensor, bits: int, generator: Generator) -> Tensor:
    """Spread each of 2^bits levels evenly over its share of [-1, 1): levels k become (k + u)·2^(1 - bits) - 1, u ~ U.

    Args:
        images: [N, C, H, W] in [-1, 1], of 8 bits; the highest `bits` are kept.
    """
    levels = quantise(images, bits).add(1).mul(((1 << bits) - 1) / 2).round_()
    u = torch.rand(images.shape, generator=generator, device=generator.device)
    return (levels + u.to(images.dtype)) * 2.0 ** (1 - bits) - 1


def undo_dequantise(x: Tensor, bits: int) -> Tensor:
    """The image in [-1, 1] in whose cells x lies; beyond the ends the ends."""
    levels = x.add(1).mul(2.0 ** (bits - 1)).floor().clamp(0, (1 << bits) - 1)
    return levels * (2 / ((1 << bits) - 1)) - 1


def log_volume(values: int, bits: int) -> float:
    """Logarithm of the volume over which an image of so many values is spread: log P(image) ≥ E[log p(x)] + this."""
    return values * (1 - bits) * math.log(2)
