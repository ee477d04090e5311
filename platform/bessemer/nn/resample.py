"""Convolution fused with resampling: the same function as the two steps, with fewer multiplications.

A 3×3 convolution after nearest-neighbour upsampling multiplies each input pixel 36 times; as one transposed
convolution with a 4×4 kernel it does so 16 times. The same holds for a 3×3 convolution before average pooling.
Both are exact, borders included, up to the order of summation (ProGAN's `fused_scale`, Karras et al. 2018).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv3x3_downsample", "upsample", "upsample_conv3x3"]


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling, [N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _box(weight: Tensor) -> Tensor:
    """[O, I, 3, 3] -> [O, I, 4, 4]: the kernel convolved with a 2×2 box of ones."""
    w = F.pad(weight, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., 1:, :-1] + w[..., :-1, 1:] + w[..., :-1, :-1]


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv2d(upsample(x), weight, bias, padding=1)`; weight [O, I, 3, 3], x [N, I, H, W] -> [N, O, 2H, 2W]."""
    kernel = _box(weight).transpose(0, 1).flip(2, 3)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def conv3x3_downsample(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`avg_pool2d(conv2d(x, weight, bias, padding=1), 2)`; x [N, I, H, W] with even H, W -> [N, O, H/2, W/2]."""
    return F.conv2d(x, _box(weight) / 4, bias, stride=2, padding=1)
