"""Modulated convolution (StyleGAN2, Karras et al. 2020, arXiv:1912.04958, section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bessemer.nn.equalised import EqualisedLinear, Initialised, leaky
from bessemer.nn.precision import full_precision
from bessemer.nn.upfirdn import blur

__all__ = ["ModulatedConv2d", "modulated_conv2d"]

_EPS = 1e-8


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    demodulate: bool = True,
    up: bool = False,
    fused: bool | None = None,
) -> Tensor:
    """Convolve each image with its own weights w'' (equations 1 and 3).

    w'_nijk = s_ni · w_jik, and with demodulation w''_nijk = w'_nijk / √(Σ_ik w'²_nijk + ε).

    Args:
        x: [N, I, H, W].
        weight: w, [O, I, k, k] with odd k.
        styles: s, [N, I].
        demodulate: divide by the expected standard deviation of the output.
        up: double the size: zeros between the pixels, convolution, low-pass filter (needs k = 3).
        fused: True convolves with the weights of N images in N groups. False scales the images before and after one
            convolution with w, which is the same function, and cheaper unless there is one image; None chooses.

    Returns:
        [N, O, H', W'].
    """
    n, i, height, width = x.shape
    o, _, k, _ = weight.shape
    if fused is None:
        fused = n == 1
    with full_precision(x):  # squares of many weights; fp16 ends at 65504
        if demodulate and x.dtype is torch.float16:  # the result does not depend on the length of either
            weight = weight / (weight.abs().amax((1, 2, 3), keepdim=True) * (k * i**0.5))
            styles = styles / styles.abs().amax(1, keepdim=True)
        norms = (styles.square() @ weight.square().sum((2, 3)).T + _EPS).rsqrt() if demodulate else None  # [N, O]
        if fused:
            weight = weight * styles[:, None, :, None, None]
            weight = weight if norms is None else weight * norms[:, :, None, None, None]
            weight = weight.reshape(n * o, i, k, k)
    groups = 1
    if fused:
        x, groups = x.reshape(1, n * i, height, width), n
    else:
        x = x * styles.to(x.dtype)[:, :, None, None]
    x = _up_conv(x, weight, groups) if up else F.conv2d(x, weight, padding=k // 2, groups=groups)
    if fused:
        return x.reshape(n, o, *x.shape[2:])
    return x if norms is None else x * norms.to(x.dtype)[:, :, None, None]


def _up_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Zeros between the pixels, 3×3 convolution, low-pass filter; [N, I, H, W] -> [N, O, 2H, 2W]."""
    # As a transposed convolution: in and out change places within each group, and the kernel is flipped.
    o, i, k, _ = weight.shape
    swapped = weight.view(groups, o // groups, i, k, k).transpose(1, 2).reshape(groups * i, o // groups, k, k)
    return blur(F.conv_transpose2d(x, swapped.flip(2, 3), stride=2, groups=groups), (1, 1), gain=4)


class ModulatedConv2d(Initialised):
    """A convolution of the synthesis network: style, modulated weights, noise, bias, activation (figure 2d).

    Args:
        in_channels: C of the input.
        out_channels: of the output.
        w_dim: length of the vectors w.
        kernel_size: 3, or 1 for the layer that makes colours.
        up: double the size.
        colour: without demodulation, noise and activation; styles scaled like weights.
        clamp: bound of activations in fp16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel_size: int = 3,
        *,
        up: bool = False,
        colour: bool = False,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.affine = EqualisedLinear(w_dim, in_channels, bias=1.0)  # A: styles start around 1
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = None if colour else nn.Parameter(torch.zeros(1))  # B: DeepSpeed needs a dimension
        self.up, self.colour, self.clamp = up, colour, clamp
        self.scale = (in_channels * kernel_size**2) ** -0.5

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        self.weight.normal_(generator=generator)
        self.bias.zero_()
        if self.noise_strength is not None:
            self.noise_strength.zero_()

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [N, in, H, W].
            w: [N, w_dim].
            noise: [N or 1, 1, H', W'], unless the layer makes colours.

        Returns:
            [N, out, H', W'], twice the size if `up`.
        """
        with full_precision(x):
            styles = self.affine(w)
        if self.colour:
            x = modulated_conv2d(x, self.weight, styles * self.scale, demodulate=False)
            x = x + self.bias.to(x.dtype)[:, None, None]
            return x.clamp(-self.clamp, self.clamp) if self.clamp and x.dtype is torch.float16 else x
        assert noise is not None
        assert self.noise_strength is not None
        x = modulated_conv2d(x, self.weight, styles, up=self.up)  # demodulation cancels He's constant
        offset = noise.to(x.dtype) * self.noise_strength.to(x.dtype) + self.bias.to(x.dtype)[:, None, None]
        return leaky(x + offset, clamp=self.clamp)
