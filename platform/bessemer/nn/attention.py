"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.spectral import SNConv2d

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """x + γ·o(attention), as in SAGAN (Zhang et al. 2019, arXiv:1805.08318) and its reference code.

    θ and φ have C/8 channels and g has C/2; φ and g are max-pooled to a quarter of the pixels, which the paper's text
    leaves out. All 1×1 convolutions are spectrally normalised and without bias; γ starts at 0, so the layer starts as
    the identity.
    """

    def __init__(self, channels: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.theta = SNConv2d(channels, channels // 8, 1, bias=False, eps=eps)
        self.phi = SNConv2d(channels, channels // 8, 1, bias=False, eps=eps)
        self.g = SNConv2d(channels, channels // 2, 1, bias=False, eps=eps)
        self.o = SNConv2d(channels // 2, channels, 1, bias=False, eps=eps)
        self.gamma = nn.Parameter(torch.zeros(1))  # (1,): DeepSpeed cannot shard a parameter without dimensions

    def attention_map(self, x: Tensor) -> Tensor:
        """β: [N, C, H, W] -> [N, HW, HW/4]; each row is a distribution over the pooled pixels."""
        theta = self.theta(x).flatten(2)
        phi = F.max_pool2d(self.phi(x), 2).flatten(2)
        return torch.softmax(theta.transpose(1, 2) @ phi, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] with even H and W -> the same shape."""
        g = F.max_pool2d(self.g(x), 2).flatten(2)
        attended = (g @ self.attention_map(x).transpose(1, 2)).reshape(x.shape[0], -1, *x.shape[2:])
        return torch.addcmul(x, self.gamma.view(1, 1, 1, 1), self.o(attended))
