"""Inverse autoregressive flows of masked convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.convolutions import WNConv2d

__all__ = ["AutoregressiveShift", "MaskedConv2d"]


def _mask(in_channels: int, out_channels: int, groups: int, kernel_size: int, *, strict: bool) -> Tensor:
    """[out, in/groups, k, k]: 1 where an output may see an input.

    Pixels come in raster order. Within a pixel, channels come in groups of equal size in which input and output have
    the same number; an output sees the groups before its own, and its own unless `strict`.
    """
    mask = torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size)
    middle = kernel_size // 2
    mask[:, :, :middle] = 1
    mask[:, :, middle, :middle] = 1
    if groups == 1:
        order = min(in_channels, out_channels)
        source = torch.arange(in_channels) * order // in_channels
        target = (torch.arange(out_channels) * order // out_channels).unsqueeze(1)
        mask[:, :, middle, middle] = (source < target if strict else source <= target).float()
    else:
        assert groups == in_channels == out_channels
        mask[:, :, middle, middle] = float(not strict)
    return mask


class MaskedConv2d(WNConv2d):
    """Weight-normalised convolution that sees earlier elements only, in raster order with channels innermost.

    Args:
        groups: 1, or the number of channels for a depthwise convolution.
        strict: whether an element is hidden from itself.
        mirror: turn the order round: later elements only.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        groups: int = 1,
        bias: bool = True,
        strict: bool,
        mirror: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups=groups, bias=bias)
        mask = _mask(in_channels, out_channels, groups, kernel_size, strict=strict)
        if mirror:
            mask = mask.flip(0, 1, 2, 3)
        self.register_buffer("mask", mask, persistent=False)

    def direction(self) -> Tensor:
        return self.weight * self.mask


class AutoregressiveShift(nn.Module):
    """z' = z - m(z), where each element of m depends on earlier elements of z only.

    An inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934) without its scales: the Jacobian is triangular
    with ones on its diagonal, so log|det| = 0 everywhere. m is an inverted residual: 3×3, depthwise 5×5 and 1×1 masked
    convolutions with ELU between them (NVAE, section 3.2 and appendix A).

    Args:
        channels: C of z, [N, C, H, W].
        expansion: hidden channels over C.
        mirror: turn the order of the elements round.
    """

    def __init__(self, channels: int, *, expansion: int = 6, mirror: bool = False) -> None:
        super().__init__()
        hidden = channels * expansion
        self.conv1 = MaskedConv2d(channels, hidden, 3, bias=False, strict=True, mirror=mirror)
        self.conv2 = MaskedConv2d(hidden, hidden, 5, groups=hidden, bias=False, strict=False, mirror=mirror)
        self.conv3 = MaskedConv2d(hidden, channels, 1, strict=False, mirror=mirror)

    def shift(self, z: Tensor) -> Tensor:
        """m(z): the shape of z."""
        h = F.elu(self.conv1(z), inplace=True)
        m: Tensor = self.conv3(F.elu(self.conv2(h), inplace=True))
        return m

    def forward(self, z: Tensor) -> Tensor:
        """One pass, all elements at once."""
        return z - self.shift(z)

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """The z that :meth:`forward` maps to this one: exact after as many passes as an image has elements."""
        x = z
        for _ in range(z[0].numel()):
            x, before = z + self.shift(x), x
            if torch.equal(x, before):
                break
        return x
