"""Residual cells of NVAE (Vahdat and Kautz 2020, arXiv:2007.03898, section 3.1 and figure 3).

Where the paper is silent (on what stands on a skip connection, say) the cells follow the published models, whose
parameter counts they reproduce.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.convolutions import Conv2d, Linear, WNConv2d
from bessemer.nn.norm import AffineBatchNorm

__all__ = ["DecoderCell", "EncoderCell", "ResidualCell", "SqueezeExcitation"]

_BRANCH = 0.1  # what a cell adds to its input: deep stacks start near the identity
_BN_MOMENTUM = 0.05


class BNSwish(nn.Module):
    """Batch normalisation, then swish x·sigmoid(x) (section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = AffineBatchNorm(channels, momentum=_BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return F.silu(self.norm(x))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) that sees the means of all (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze, self.excite = Linear(channels, hidden), Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class _DownSkip(nn.Module):
    """Swish, then four 1×1 convolutions with stride 2, one for each pixel of a 2×2 square, side by side."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        widths = (quarter, quarter, quarter, out_channels - 3 * quarter)
        self.convs = nn.ModuleList(WNConv2d(in_channels, width, 1, stride=2) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        corners = (x, x[:, :, 1:, 1:], x[:, :, :, 1:], x[:, :, 1:, :])
        return torch.cat([conv(corner) for conv, corner in zip(self.convs, corners, strict=True)], 1)


class _UpSkip(nn.Module):
    """1×1 convolution, then bilinear upsampling to twice the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WNConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The two commute; in this order the convolution costs a quarter.
        return F.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=True)


class ResidualCell(nn.Module):
    """skip(x) + 0.1·branch(x): the frame of both kinds of cell.

    Args:
        branch: [N, in_channels, H, W] -> [N, out_channels, H', W'].
        resample: halve the size (`down`) or double it (`up`); the number of channels changes only then.
        se: end the branch with squeeze and excitation.
    """

    def __init__(
        self,
        branch: nn.Module,
        in_channels: int,
        out_channels: int,
        resample: Literal["up", "down"] | None,
        *,
        se: bool,
    ) -> None:
        super().__init__()
        assert resample is not None or in_channels == out_channels
        self.branch = branch
        self.se: nn.Module = SqueezeExcitation(out_channels) if se else nn.Identity()
        self.skip: nn.Module = nn.Identity()
        if resample is not None:
            self.skip = (_UpSkip if resample == "up" else _DownSkip)(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.skip(x), self.se(self.branch(x)), alpha=_BRANCH)


class EncoderCell(ResidualCell):
    """Cell of the bottom-up network: BN-swish and 3×3 convolution, twice (figure 3b)."""

    def __init__(self, in_channels: int, out_channels: int, *, down: bool = False, se: bool = True) -> None:
        branch = nn.Sequential(
            BNSwish(in_channels),
            WNConv2d(in_channels, out_channels, 3, stride=2 if down else 1),
            BNSwish(out_channels),
            WNConv2d(out_channels, out_channels, 3),
        )
        super().__init__(branch, in_channels, out_channels, "down" if down else None, se=se)


class DecoderCell(ResidualCell):
    """Cell of the generative network, an inverted residual (figure 3a).

    BN, 1×1 to `expansion` times the channels, BN-swish, depthwise k×k, BN-swish, 1×1, BN. Convolutions are followed by
    normalisation, so they need neither biases nor weight normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int = 6,
        kernel_size: int = 5,
        up: bool = False,
        se: bool = True,
    ) -> None:
        hidden = in_channels * expansion
        branch = nn.Sequential(
            AffineBatchNorm(in_channels, momentum=_BN_MOMENTUM),
            Conv2d(in_channels, hidden, 1, bias=False),
            BNSwish(hidden),
            # Here and not in front of the cell: what is pointwise commutes with nearest-neighbour upsampling, and a
            # quarter of the pixels is a quarter of the work.
            nn.Upsample(scale_factor=2) if up else nn.Identity(),
            Conv2d(hidden, hidden, kernel_size, groups=hidden, bias=False),
            BNSwish(hidden),
            Conv2d(hidden, out_channels, 1, bias=False),
            AffineBatchNorm(out_channels, momentum=_BN_MOMENTUM),
        )
        super().__init__(branch, in_channels, out_channels, "up" if up else None, se=se)
