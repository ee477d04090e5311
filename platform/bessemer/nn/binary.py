"""Black and white images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

__all__ = ["Binarisation", "binarise", "draw_bits"]

Binarisation = Literal["random", "threshold"]


def draw_bits(probabilities: Tensor, generator: Generator) -> Tensor:
    """1 with the given probabilities, else 0; of their shape and type."""
    u = torch.rand(probabilities.shape, generator=generator, device=generator.device)
    return (u < probabilities).to(probabilities.dtype)


def binarise(images: Tensor, rule: Binarisation, generator: Generator) -> Tensor:
    """Images in [-1, 1] -> black (-1) and white (1).

    Args:
        rule: `random` draws each pixel anew with its grey value as the probability of white (Salakhutdinov and Murray
            2008); `threshold` makes what is brighter than the middle white, and draws nothing.
    """
    if rule == "threshold":
        return torch.where(images > 0, 1.0, -1.0).to(images.dtype)
    return 2 * draw_bits(images.add(1).div(2), generator) - 1
