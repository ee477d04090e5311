"""Spectral normalisation (Miyato et al., Spectral Normalization for GANs, ICLR 2018, arXiv:1802.05957).

Each layer divides its weight W, flattened to [out, rest], by an estimate σ of its largest singular value. One
vector u per layer carries the power iteration. It moves once per update (:meth:`SpectralNorm.begin_update`), so
that all slices of an update share it however many workers there are; forward passes never move it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.convolutions import ResamplingConv2d
from bessemer.nn.precision import full_precision
from bessemer.nn.unset import Unset
from bessemer.nn.update_state import UpdateStateLayer

__all__ = ["SNConv2d", "SNConv3d", "SNEmbedding", "SNLinear", "SpectralNorm", "power_iterate"]


class SpectralNorm(Unset, UpdateStateLayer):
    """Mixin for layers with a `weight`; put it before the layer's class in the bases.

    Weights and u are zeros until :func:`bessemer.nn.init.init_weights` or `load_state_dict`.
    """

    weight: Tensor
    u: Tensor
    """[out], not normalised at initialisation; of length 1 after the first update."""
    eps: float

    def _register_u(self, eps: float) -> None:
        self.eps = eps
        self.register_buffer("u", torch.zeros(self.weight.shape[0], device=self.weight.device))

    def begin_update(self) -> None:
        self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Move u by one power iteration, in place."""
        W = self.weight.flatten(1)
        v = F.normalize(W.T @ self.u, dim=0, eps=self.eps)
        self.u.copy_(F.normalize(W @ v, dim=0, eps=self.eps))

    def sigma(self) -> Tensor:
        """σ = ūᵀWv with v = Wᵀu and ū = Wv, both scaled to length 1 and constant: dσ/dW = ūvᵀ, a scalar.

        v and ū come from the stored u and the present W, so σ fits whatever weights were loaded (an average, say),
        and u need not have length 1.
        """
        with full_precision(self.weight):  # σ in half precision would shake the weights
            W = self.weight.flatten(1)
            with torch.no_grad():
                v = F.normalize(W.T @ self.u, dim=0, eps=self.eps)
            Wv = W @ v
            return F.normalize(Wv.detach(), dim=0, eps=self.eps) @ Wv

    def normalised_weight(self) -> Tensor:
        """W/σ, with the gradient of both."""
        return self.weight / self.sigma()


class SNConv2d(SpectralNorm, ResamplingConv2d):
    """Spectrally normalised 2-D convolution that keeps the size, or doubles or halves it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = True,
        resample: Literal["up", "down"] | None = None,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, resample=resample)
        self._register_u(eps)

    def effective_weight(self) -> Tensor:
        return self.normalised_weight()


class SNConv3d(SpectralNorm, nn.Conv3d):
    """Spectrally normalised 3-D convolution that keeps the size.

    Args:
        kernel_size: odd, of all three dimensions; padding is half of it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, eps: float = 1e-12) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self._register_u(eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, T, H, W] -> [N, out, T, H, W]."""
        return F.conv3d(x, self.normalised_weight(), self.bias, padding=self.padding)


class SNLinear(SpectralNorm, nn.Linear):
    """Spectrally normalised linear layer."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, eps: float = 1e-12) -> None:
        super().__init__(in_features, out_features, bias)
        self._register_u(eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        return F.linear(x, self.normalised_weight(), self.bias)


class SNEmbedding(SpectralNorm, nn.Embedding):
    """Spectrally normalised table of vectors; W is [entries, features]."""

    def __init__(self, entries: int, features: int, *, eps: float = 1e-12) -> None:
        super().__init__(entries, features)
        self._register_u(eps)

    def forward(self, index: Tensor) -> Tensor:
        """[N] int64 -> [N, features]."""
        # Divided after the look-up: the table may hold far more rows than the slice asks for.
        return F.embedding(index, self.weight) / self.sigma()


def power_iterate(module: nn.Module, n: int) -> None:
    """Move u of every spectrally normalised layer below `module` by `n` power iterations."""
    for layer in module.modules():
        if isinstance(layer, SpectralNorm):
            for _ in range(n):
                layer.power_iteration()
