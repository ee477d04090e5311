"""Convolutions and linear layers for networks without spectral normalisation.

Their constructors draw nothing: weights are zeros until :func:`bessemer.nn.init.init_weights`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.precision import full_precision
from bessemer.nn.resample import conv3x3_downsample, upsample_conv3x3
from bessemer.nn.unset import Unset

__all__ = [
    "Conv1d",
    "Conv2d",
    "DoublingConv2d",
    "HalvingConv2d",
    "Linear",
    "ResamplingConv2d",
    "WNConv2d",
    "weight_normalised",
]


def weight_normalised(direction: Tensor, log_gain: Tensor) -> Tensor:
    """Weight normalisation, w = g·v/‖v‖ for each output channel (Salimans and Kingma 2016, arXiv:1602.07868, eq. 2).

    Args:
        direction: v, [..., out, in, k, k].
        log_gain: log g, [..., out, 1, 1, 1].
    """
    with full_precision(direction):
        # The constant keeps the gradient finite for rows that are all masked.
        norm = (direction.square().sum((-3, -2, -1), keepdim=True) + 1e-10).sqrt()
        return direction * (log_gain.exp() / norm)


class Linear(Unset, nn.Linear):
    """A linear layer."""


class Conv1d(Unset, nn.Conv1d):
    """A 1-D convolution without padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, *, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation)


class Conv2d(Unset, nn.Conv2d):
    """A 2-D convolution that keeps the size, or divides it by `stride`.

    Args:
        kernel_size: odd; padding is half of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=bias
        )

    def direction(self) -> Tensor:
        """The weight before normalisation; layers that mask it do so here."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """The weight that the input meets, [out, in/groups, k, k], with its gradient."""
        return self.direction()


class HalvingConv2d(Unset, nn.Conv2d):
    """A 4×4 convolution that halves height and width (DCGAN)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 4, 2, 1, bias=bias)


class DoublingConv2d(Unset, nn.ConvTranspose2d):
    """A transposed 4×4 convolution that doubles height and width (DCGAN)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 4, 2, 1, bias=bias)


class WNConv2d(Conv2d):
    """Convolution with weight normalisation; see :func:`weight_normalised`.

    v is the parameter `weight`, and each output channel has its own g = exp(`log_gain`), as in section 2.1. After
    initialisation g = ‖v‖, so that training starts from v itself.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias)
        self.log_gain = nn.Parameter(torch.zeros(out_channels, 1, 1, 1))

    @torch.no_grad()
    def reset_gain(self) -> None:
        """Set g to ‖v‖."""
        self.log_gain.copy_(
            torch.linalg.vector_norm(self.direction(), dim=(1, 2, 3), keepdim=True).clamp_min(1e-5).log()
        )

    def effective_weight(self) -> Tensor:
        return weight_normalised(self.direction(), self.log_gain)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        return F.conv2d(x, self.effective_weight(), self.bias, self.stride, self.padding, groups=self.groups)


class ResamplingConv2d(Unset, nn.Conv2d):
    """2-D convolution that keeps the size, or doubles or halves it.

    Args:
        kernel_size: odd; padding is half of it.
        resample: `up` upsamples (nearest neighbour) before the convolution, `down` pools (average) after it; both
            need kernel size 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = True,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        assert resample is None or kernel_size == 3
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.resample = resample

    def effective_weight(self) -> Tensor:
        """The weight that the input meets, [out, in, k, k], with its gradient."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        weight = self.effective_weight()
        if self.resample == "up":
            return upsample_conv3x3(x, weight, self.bias)
        if self.resample == "down":
            return conv3x3_downsample(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=self.padding)
