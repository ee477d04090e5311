"""Penalties that keep deep networks Lipschitz: largest singular values, and largest gains of batch normalisation."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Conv2d, WNConv2d, weight_normalised
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.precision import full_precision
from bessemer.nn.update_state import UpdateStateLayer

__all__ = ["SpectralPenalty", "largest_gains"]


class SpectralPenalty(UpdateStateLayer):
    """Σ σ(W): the largest singular values of all convolutions below a network, by power iteration.

    Spectral regularisation (Yoshida and Miyato 2017, arXiv:1705.10941; NVAE, section 3.2). W is the effective weight of
    a convolution, flattened to [out, rest]. Weights of one shape are treated together: small kernels by the thousand
    would cost more than the work in them. The vectors u move once per update, before its first slice, so that all
    slices share them however many workers there are, and are kept in checkpoints. Reads whole weights outside their
    layers' forward passes.

    Args:
        network: whose convolutions are meant; not registered as a submodule.
        iterations: power iterations per update.
    """

    def __init__(self, network: nn.Module, iterations: int = 4) -> None:
        super().__init__()
        self.iterations = iterations
        by_shape: dict[tuple[object, ...], list[Conv2d]] = defaultdict(list)
        for layer in network.modules():
            if isinstance(layer, Conv2d):
                by_shape[(isinstance(layer, WNConv2d), *layer.weight.shape)].append(layer)
        self._groups = list(by_shape.values())  # a plain list: the layers belong to the network
        for i, group in enumerate(self._groups):
            self.register_buffer(f"u{i}", group[0].weight.new_zeros(len(group), group[0].out_channels))

    def _weights(self, group: list[Conv2d]) -> Tensor:
        """Effective weights, [layers, out, rest]."""
        weights = torch.stack([layer.direction() for layer in group])
        gains: list[Tensor] = [layer.log_gain for layer in group if isinstance(layer, WNConv2d)]
        return (weight_normalised(weights, torch.stack(gains)) if gains else weights).flatten(2)

    @torch.no_grad()
    def reset(self, generator: Generator, iterations: int = 40) -> None:
        """Draw u from N(0, 1) and bring it near the first singular vectors."""
        for i in range(len(self._groups)):
            self.get_buffer(f"u{i}").normal_(generator=generator)
        self.power_iteration(iterations)

    def begin_update(self) -> None:
        self.power_iteration(self.iterations)

    @torch.no_grad()
    def power_iteration(self, iterations: int) -> None:
        """Move all u by so many power iterations, in place."""
        for i, group in enumerate(self._groups):
            W, buffer = self._weights(group), self.get_buffer(f"u{i}")
            with full_precision(W):
                u = buffer.unsqueeze(2)
                for _ in range(iterations):
                    u = F.normalize(W @ F.normalize(W.mT @ u, dim=1), dim=1)
            buffer.copy_(u.squeeze(2))

    def singular_values(self) -> Tensor:
        """σ = ūᵀWv of every convolution, [convolutions], with v = Wᵀu and ū = Wv scaled to length 1 and constant."""
        found = []
        for i, group in enumerate(self._groups):
            W = self._weights(group)
            with full_precision(W):
                with torch.no_grad():
                    v = F.normalize(W.mT @ self.get_buffer(f"u{i}").unsqueeze(2), dim=1)
                Wv = W @ v
                found.append((F.normalize(Wv.detach(), dim=1) * Wv).sum((1, 2)))
        return torch.cat(found)

    def forward(self) -> Tensor:
        """The sum, a scalar."""
        return self.singular_values().sum()


def largest_gains(network: nn.Module) -> Tensor:
    """Σ max|γ| over all batch normalisation layers of `network`: a scalar (NVAE, section 3.2)."""
    by_channels: dict[int, list[Tensor]] = defaultdict(list)
    for layer in network.modules():
        if isinstance(layer, AffineBatchNorm):
            by_channels[layer.channels].append(layer.gain)
    return torch.stack([torch.stack(gains).abs().amax(1).sum() for gains in by_channels.values()]).sum()
