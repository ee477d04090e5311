"""Instance normalisation: each map by its own pixels, so that no image depends on others, in training or sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.precision import full_precision

__all__ = ["InstanceNorm"]


class InstanceNorm(nn.Module):
    """Each channel of each image to mean 0 and variance 1 (Ulyanov et al. 2016, arXiv:1607.08022).

    It is what batch normalisation is at batch size 1, in computing statistics at sampling time too.

    Args:
        channels: of the maps.
        affine: learn a gain and a bias per channel, 1 and 0 at initialisation.
    """

    def __init__(self, channels: int, *, affine: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.gain = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def reset(self) -> None:
        """Gain 1, bias 0."""
        if self.gain is not None and self.bias is not None:
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], of more than one pixel -> the same shape."""
        with full_precision(x):
            y = F.instance_norm(x.float(), weight=self.gain, bias=self.bias, eps=self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, affine={self.gain is not None}, eps={self.eps}"
