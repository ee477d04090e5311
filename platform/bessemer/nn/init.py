"""Initial weights drawn from a generator that is handed in, so that they are a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Generator, nn

from bessemer.nn.attention import SelfAttention
from bessemer.nn.convolutions import WNConv2d
from bessemer.nn.instance_norm import InstanceNorm
from bessemer.nn.norm import AffineBatchNorm, BatchNorm
from bessemer.nn.spectral import SpectralNorm

__all__ = ["WeightInit", "init_weights", "scale_branches"]

WeightInit = Literal["orthogonal", "normal", "xavier", "uniform"]


@torch.no_grad()
def init_weights(
    module: nn.Module, generator: Generator, weights: WeightInit, *, biases: Literal["uniform", "zeros"] = "uniform"
) -> None:
    """Set every parameter and buffer of the layers of this package below `module`, in place.

    Weights of convolutions, linear layers and embeddings follow `weights`: orthogonal, N(0, 0.02²), Xavier uniform, or
    uniform in ±1/√fan_in. Their biases follow `biases`: uniform in ±1/√fan_in, PyTorch's default, or 0. Gains of weight
    normalisation are the lengths of the drawn weights. u of spectral norm is N(0, 1), not normalised.

    Args:
        generator: on the device of the module.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)):
            if weights == "orthogonal":
                nn.init.orthogonal_(layer.weight, generator=generator)
            elif weights == "normal":
                nn.init.normal_(layer.weight, 0.0, 0.02, generator=generator)
            elif weights == "xavier":
                nn.init.xavier_uniform_(layer.weight, generator=generator)
            bound = layer.weight[0].numel() ** -0.5
            if weights == "uniform":
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            bias = getattr(layer, "bias", None)
            if bias is not None and biases == "uniform":
                nn.init.uniform_(bias, -bound, bound, generator=generator)
            elif bias is not None:
                nn.init.zeros_(bias)
        if isinstance(layer, WNConv2d):
            layer.reset_gain()
        if isinstance(layer, SpectralNorm):
            layer.u.normal_(generator=generator)
        elif isinstance(layer, BatchNorm):
            layer.reset_statistics()
            if isinstance(layer, AffineBatchNorm):
                nn.init.ones_(layer.gain)
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, InstanceNorm):
            layer.reset()
        elif isinstance(layer, SelfAttention):
            nn.init.zeros_(layer.gamma)


@torch.no_grad()
def scale_branches(blocks: Iterable[nn.Module]) -> None:
    """Multiply the weights of residual blocks' two convolutions by He's √2, for the ReLU before each, in place.

    Args:
        blocks: with layers `conv1` and `conv2`; shortcuts, which see no ReLU, stay as they are.
    """
    for block in blocks:
        for name in ("conv1", "conv2"):
            block.get_submodule(name).get_parameter("weight").mul_(2**0.5)
