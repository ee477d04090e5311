"""Shifted convolutions: each output sees the pixels above it, or above it and to its left (PixelCNN++, section 2.3).

All of them are weight-normalised, and set their gains and biases from the first images if asked to (Salimans and Kingma
2016, arXiv:1602.07868, section 3). They work on whole maps, or on a part of one row at a time: so pixels are drawn one
after the other without computing anything twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import weight_normalised
from bessemer.nn.data_init import DataInitialised

__all__ = ["ShiftedConv2d", "ShiftedDeconv2d", "blank_map", "put"]

_STILL = 1e-5
"""Deviation below which an output is the same for all images, but for rounding."""


def blank_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A map to be filled pixel by pixel, with the zeros around it that convolutions see: [N, C, H + 1, W + 2]."""
    return x.new_zeros(x.shape[0], channels, height + 1, width + 2)


def put(blank: Tensor, part: Tensor, row: int, column: int) -> None:
    """Write [N, C, h, w] into a map, its first pixel to (row, column)."""
    h, w = part.shape[2:]
    blank[:, :, row + 1 : row + 1 + h, column + 1 : column + 1 + w] = part


class _WeightNormalised(DataInitialised):
    """v with a gain and a bias for each output channel.

    Args:
        init_scale: standard deviation of the outputs for the first images.
    """

    def __init__(self, shape: tuple[int, ...], out_channels: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.zeros(shape))
        self.log_gain = nn.Parameter(torch.zeros(out_channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        """V ~ N(0, 0.05²), gain 1, bias 0."""
        self.weight.normal_(0, 0.05, generator=generator)
        self.log_gain.zero_()
        self.bias.zero_()

    def effective_weight(self) -> Tensor:
        return weight_normalised(self.weight, self.log_gain)

    @torch.no_grad()
    def _adjusted(self, y: Tensor) -> Tensor:
        """The output with mean 0 and deviation `init_scale` in each channel; the layer now gives just that.

        Channels that no pixel moves, as the smallest maps of the smallest images have them, keep their gain.
        """
        std, mean = torch.std_mean(y.float(), (0, 2, 3), correction=0)
        scale = torch.where(std > _STILL, self.init_scale / std.clamp_min(_STILL), 1.0)
        self.bias.copy_((self.bias - mean) * scale)
        self.log_gain.add_(scale.log().view(-1, 1, 1, 1))
        return (y - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)


class ShiftedConv2d(_WeightNormalised):
    """Convolution that sees its own row and the one above.

    Args:
        kernel: (2, 3) sees one column to each side: for a stream that is shifted down, or pixels would see what is to
            their right. (2, 2) sees the column to the left. (1, 1) sees its own pixel.
        stride: divides height and width.
        init_scale: standard deviation of the outputs for the first images.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], *, stride: int = 1, init_scale: float = 1.0
    ) -> None:
        super().__init__((out_channels, in_channels, *kernel), out_channels, init_scale)
        self.kernel, self.stride = kernel, stride
        self.left = kernel[1] // 2
        """Columns that it sees to the left."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H/stride, W/stride]."""
        (h, w), left = self.kernel, self.left
        padded = F.pad(x, (left, w - 1 - left, h - 1, 0))
        y = F.conv2d(padded, self.effective_weight(), self.bias, self.stride)
        return self._adjusted(y) if self.initialises else y

    def at(self, x: Tensor, weight: Tensor, row: int, start: int, stop: int) -> Tensor:
        """Outputs in one row, columns start to stop, from a map of :func:`blank_map`: [N, out, 1, stop - start].

        Args:
            weight: :meth:`effective_weight`, which the caller computes once.
        """
        (h, w), s = self.kernel, self.stride
        rows = slice(row * s + 2 - h, row * s + 2)
        first = start * s + 1 - self.left
        columns = slice(first, first + (stop - start - 1) * s + w)
        return F.conv2d(x[:, :, rows, columns], weight, self.bias, s)


class ShiftedDeconv2d(_WeightNormalised):
    """Transposed convolution that doubles height and width: 2×2 pixels from one, with (2, 3) its neighbour's too."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int]) -> None:
        super().__init__((in_channels, out_channels, *kernel), out_channels)
        self.kernel = kernel

    def effective_weight(self) -> Tensor:
        """W [in, out, 2, k]: inputs come first, and a gain is of one output."""
        return weight_normalised(self.weight.transpose(0, 1), self.log_gain).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        y = F.conv_transpose2d(x, self.effective_weight(), self.bias, 2)
        first = (self.kernel[1] - 1) // 2
        y = y[:, :, :, first : first + 2 * x.shape[3]]
        return self._adjusted(y) if self.initialises else y

    def at(self, x: Tensor, weight: Tensor, row: int, start: int, stop: int) -> Tensor:
        """The two rows of outputs that belong to columns start to stop of one row: [N, out, 2, 2·(stop - start)]."""
        reach = (self.kernel[1] - 1) // 2  # columns to each side whose outputs reach here
        part = x[:, :, row + 1 : row + 2, start + 1 - reach : stop + 1 + reach]
        y = F.conv_transpose2d(part, weight, self.bias, 2)
        first = 3 * reach
        return y[:, :, :, first : first + 2 * (stop - start)]
