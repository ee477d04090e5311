"""The μ-law of telephony (ITU-T G.711): sound in few levels, fine near silence and coarse where it is loud."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["mu_law_decode", "mu_law_encode"]


def mu_law_encode(x: Tensor, levels: int) -> Tensor:
    """f(x) = sign(x) ln(1 + μ|x|) / ln(1 + μ), rounded to the nearest of the levels (WaveNet, section 2.2).

    Args:
        x: in [-1, 1], any shape.
        levels: μ + 1.

    Returns:
        int64 in [0, μ], of the same shape.
    """
    mu = levels - 1
    y = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return ((y + 1) * (mu / 2)).round().clamp(0, mu).long()


def mu_law_decode(codes: Tensor, levels: int) -> Tensor:
    """The value in the middle of each level, float32 in [-1, 1]: :func:`mu_law_encode` gives the level back."""
    mu = levels - 1
    y = codes.float() * (2 / mu) - 1
    return y.sign() * torch.expm1(y.abs() * math.log1p(mu)) / mu
