"""Antialiased bicubic resizing of floats: what Pillow does to an image of mode F, as matrix products.

clean-fid resizes each colour plane with Pillow in floats and clamps (Parmar et al., On Aliased Resizing and
Surprising Subtleties in GAN Evaluation, CVPR 2022, arXiv:2104.11222). Resizing is linear and separable, so a batch
is two matrix products with the same weights: one along the lines, which is small, and one across them. The second takes
most of the time, and most of its weights are zero: it is done in bands of lines that need only some of the old ones.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["bicubic_weights", "resize_bicubic"]

_A = -0.5  # Pillow's parameter of the cubic kernel
_BANDS = 4  # more save little, and each costs a call


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    inner = ((_A + 2) * x - (_A + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * _A - 4 * _A
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def bicubic_weights(old: int, new: int) -> NDArray[np.float64]:
    """Matrix [new, old] that resizes a line of `old` pixels; the kernel widens with the scale when shrinking."""
    scale = old / new
    stretch = max(scale, 1.0)
    center = (np.arange(new) + 0.5) * scale
    low = np.floor(center - 2 * stretch + 0.5).clip(0, old)
    high = np.floor(center + 2 * stretch + 0.5).clip(0, old)
    pixel = np.arange(old)
    weights = _cubic((pixel + 0.5 - center[:, None]) / stretch)
    weights[(pixel < low[:, None]) | (pixel >= high[:, None])] = 0
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


@lru_cache(maxsize=16)
def _weights(old: int, new: int, device: torch.device) -> Tensor:
    return torch.from_numpy(bicubic_weights(old, new)).to(device, torch.float32)


@lru_cache(maxsize=16)
def _bands(old: int, new: int, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """New lines, the old ones that they need, and the weights between them."""
    bands, weights = [], bicubic_weights(old, new)
    for lines in np.array_split(np.arange(new), min(_BANDS, new)):
        needed = np.flatnonzero(weights[lines].any(axis=0))
        new_lines, old_lines = (slice(int(x[0]), int(x[-1]) + 1) for x in (lines, needed))
        bands.append((new_lines, old_lines, _weights(old, new, device)[new_lines, old_lines].contiguous()))
    return bands


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Resize [N, C, H, W] images with values in [0, 255] to [N, C, size, size] float32, clamped to [0, 255]."""
    x = images.float()
    shape = (*x.shape[:2], size, size)
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x.clamp(0, 255)
    x = x.reshape(-1, height, width)
    if width != size:
        x = (x.reshape(-1, width) @ _weights(width, size, x.device).T).reshape(-1, height, size)
    if height != size:
        lines, x = x, x.new_empty(len(x), size, size)
        for new, old, weights in _bands(height, size, x.device):
            torch.bmm(weights.expand(len(x), -1, -1), lines[:, old], out=x[:, new])
    return x.clamp_(0, 255).reshape(shape)
