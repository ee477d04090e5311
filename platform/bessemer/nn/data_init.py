"""Layers whose scales and biases are set by the first real images that pass through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ActNorm", "DataInitialised", "initialising"]


class DataInitialised(nn.Module):
    """A layer that sets parameters from its input in a forward pass inside :func:`initialising`."""

    initialises: bool = False


@contextmanager
def initialising(network: nn.Module) -> Iterator[None]:
    """Forward passes meanwhile set the layers below `network`, each by what the layers before it make of the images."""
    layers = [m for m in network.modules() if isinstance(m, DataInitialised)]
    for layer in layers:
        layer.initialises = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.initialises = False


class ActNorm(DataInitialised):
    """(x + b)·exp(3l) for each channel (Glow, Kingma and Dhariwal 2018, arXiv:1807.03039, section 3.1).

    The first images leave with mean 0 and variance 1. The factor 3 is the authors': it lets scales learn faster.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> the same shape, and the log-determinant of each image, a scalar."""
        if self.initialises:
            self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.log_scale.copy_(-(x.std((0, 2, 3), keepdim=True, correction=0) + 1e-6).log() / 3)
        log_scale = 3 * self.log_scale
        return (x + self.bias) * log_scale.exp(), log_scale.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y: Tensor) -> Tensor:
        """The x that :meth:`forward` maps to y."""
        return y * (-3 * self.log_scale).exp() - self.bias
