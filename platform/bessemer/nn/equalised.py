"""Layers with an equalised learning rate (ProGAN, Karras et al. 2018, arXiv:1710.10196, section 4.1).

Weights start as N(0, 1) and are multiplied by He's constant 1/√fan_in in every forward pass, so that Adam's steps mean
the same to all layers. Weights are zeros until `init_weights` or `load_state_dict`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bessemer.nn.upfirdn import blur, downsample

__all__ = ["EqualisedConv2d", "EqualisedLinear", "Initialised", "leaky"]

GAIN = 2**0.5
"""Keeps the variance through a leaky ReLU: He's √2."""


class Initialised(nn.Module):
    """A layer that draws its own initial weights."""

    def init_weights(self, generator: Generator) -> None:
        """Draw all parameters and buffers of this layer, not those of layers below it, in place."""
        raise NotImplementedError


def leaky(x: Tensor, gain: float = GAIN, clamp: float | None = None) -> Tensor:
    """Leaky ReLU of slope 0.2 times `gain`; fp16 activations, which end at 65504, are then clamped to ±`clamp`."""
    x = F.leaky_relu(x, 0.2) * gain
    return x.clamp(-clamp * gain, clamp * gain) if clamp is not None and x.dtype is torch.float16 else x


class EqualisedLinear(Initialised):
    """Linear layer.

    Args:
        in_features: length of the input vectors.
        out_features: length of the output vectors.
        bias: initial value of the bias.
        activate: a scaled leaky ReLU follows.
        lr_factor: of the learning rate of this layer, relative to that of the others (StyleGAN, section C).
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: float = 0.0, activate: bool = False, lr_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.initial_bias, self.activate, self.lr_factor = bias, activate, lr_factor

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        self.weight.normal_(0, 1 / self.lr_factor, generator=generator)
        self.bias.fill_(self.initial_bias / self.lr_factor)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        weight = self.weight * (self.lr_factor * self.weight.shape[1] ** -0.5)
        y = F.linear(x, weight, self.bias * self.lr_factor)
        return leaky(y) if self.activate else y


class EqualisedConv2d(Initialised):
    """Convolution that keeps the size or halves it, with the low-pass filter before (Zhang 2019, arXiv:1904.11486).

    Args:
        in_channels: C of the input [N, C, H, W].
        out_channels: of the output.
        kernel_size: 1 or 3.
        bias: whether there is one.
        activate: a scaled leaky ReLU follows.
        down: halve height and width.
        gain: factor of the output.
        clamp: bound of activations in fp16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = True,
        activate: bool = True,
        down: bool = False,
        gain: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.activate, self.down, self.gain, self.clamp = activate, down, gain, clamp
        self.scale = (in_channels * kernel_size**2) ** -0.5

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        self.weight.normal_(generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        size = self.weight.shape[-1]
        linear_gain = 1.0 if self.activate else self.gain
        weight = self.weight * (self.scale * linear_gain)
        bias = None if self.bias is None else (self.bias * linear_gain).to(x.dtype)
        if self.down and size == 1:  # a convolution of single pixels may as well come after the loss of three in four
            y = F.conv2d(downsample(x), weight, bias)
        elif self.down:
            y = F.conv2d(blur(x, (2, 2)), weight, bias, stride=2)
        else:
            y = F.conv2d(x, weight, bias, padding=size // 2)
        return leaky(y, GAIN * self.gain, self.clamp) if self.activate else y
