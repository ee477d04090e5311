"""BigGAN-deep (Brock, Donahue and Simonyan 2019, arXiv:1809.11096), appendix B, figure 16 and tables 7 to 9.

Bottleneck blocks, two per resolution, with shortcuts of their own kind: G drops channels and D appends
some. The whole of z joins the class embedding and conditions every block. Losses, sampling and optimizers
are BigGAN's.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bessemer.nn.attention import SelfAttention
from bessemer.nn.embedding import embedding
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.resample import upsample
from bessemer.nn.spectral import SNConv2d, SNEmbedding, SNLinear
from bessemer.systems.adversarial.biggan import BigGAN, CommonConfig
from bessemer.systems.adversarial.biggan_networks import D_WIDTHS, G_WIDTHS, conditional_norm, normalised
from bessemer.systems.contract import SystemConfig

__all__ = ["BigGANDeep", "BigGANDeepConfig", "BigGANDeepDiscriminator", "BigGANDeepGenerator"]

BOTTLENECK = 4
"""Channels of a block over those of its 3x3 convolutions."""


class BigGANDeepConfig(CommonConfig):
    """Configuration of BigGAN-deep."""

    generator_width: Annotated[int, Field(ge=1)] = 128
    """ch of the generator: its narrowest layer."""
    discriminator_width: Annotated[int, Field(ge=1)] = 128
    """ch of the discriminator."""
    latent_dim: Annotated[int, Field(ge=1)] = 128
    """Dimension of z."""
    shared_dim: Annotated[int, Field(ge=1)] = 128
    """Dimension of the class embedding that all normalisation layers share."""
    generator_depth: Annotated[int, Field(ge=1)] = 2
    """Blocks per resolution in the generator."""
    discriminator_depth: Annotated[int, Field(ge=1)] = 2
    """Blocks per resolution in the discriminator."""
    pooling: Literal["sum", "mean"] = "sum"
    """Pooling over the last feature map of the discriminator: sum (BigGAN-PyTorch) or mean (compare_gan)."""


class _GeneratorBlock(nn.Module):
    """Bottleneck block of G (figure 16b); `up` doubles the resolution."""

    def __init__(
        self, c: BigGANDeepConfig, in_channels: int, out_channels: int, condition_dim: int, *, up: bool
    ) -> None:
        super().__init__()
        hidden = in_channels // BOTTLENECK
        self.out_channels, self.up = out_channels, up
        self.norm1 = conditional_norm(c, in_channels, condition_dim)
        self.conv1 = SNConv2d(in_channels, hidden, 1, eps=c.sn_eps)
        self.norm2 = conditional_norm(c, hidden, condition_dim)
        self.conv2 = SNConv2d(hidden, hidden, resample="up" if up else None, eps=c.sn_eps)
        self.norm3 = conditional_norm(c, hidden, condition_dim)
        self.conv3 = SNConv2d(hidden, hidden, eps=c.sn_eps)
        self.norm4 = conditional_norm(c, hidden, condition_dim)
        self.conv4 = SNConv2d(hidden, out_channels, 1, eps=c.sn_eps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = x
        for norm, conv in (
            (self.norm1, self.conv1),
            (self.norm2, self.conv2),
            (self.norm3, self.conv3),
            (self.norm4, self.conv4),
        ):
            h = conv(normalised(norm, h, condition))
        x = x[:, : self.out_channels]
        return h + (upsample(x) if self.up else x)


class BigGANDeepGenerator(nn.Module):
    """G(z, y) (tables 7a to 9a): z [N, latent_dim], classes [N] -> images [N, channels, R, R] in [-1, 1]."""

    def __init__(self, c: BigGANDeepConfig) -> None:
        super().__init__()
        widths = [c.generator_width * w for w in G_WIDTHS[c.resolution]]
        condition_dim = c.latent_dim + c.shared_dim * c.conditional
        self.shared = embedding(c.classes, c.shared_dim) if c.conditional else None
        self.linear = SNLinear(condition_dim, widths[0] * 4 * 4, eps=c.sn_eps)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()
        for i, (before, after) in enumerate(pairwise(widths)):
            for _ in range(c.generator_depth - 1):
                self.blocks.append(_GeneratorBlock(c, before, before, condition_dim, up=False))
            self.blocks.append(_GeneratorBlock(c, before, after, condition_dim, up=True))
            if 8 << i in c.generator_attention:
                self.attention[str(len(self.blocks) - 1)] = SelfAttention(after, eps=c.sn_eps)
        self.norm = AffineBatchNorm(widths[-1], eps=c.bn_eps, momentum=c.bn_momentum)
        self.conv = SNConv2d(widths[-1], c.channels, eps=c.sn_eps)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        condition = z if self.shared is None else torch.cat([z, self.shared(labels)], 1)
        h = self.linear(condition).view(z.shape[0], -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            h = block(h, condition)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return torch.tanh(self.conv(F.relu(self.norm(h), inplace=True)))


class _DiscriminatorBlock(nn.Module):
    """Bottleneck block of D (figure 16c); `down` halves the resolution."""

    def __init__(self, c: BigGANDeepConfig, in_channels: int, out_channels: int, *, down: bool) -> None:
        super().__init__()
        hidden = out_channels // BOTTLENECK
        self.down = down
        self.conv1 = SNConv2d(in_channels, hidden, 1, eps=c.sn_eps)
        self.conv2 = SNConv2d(hidden, hidden, eps=c.sn_eps)
        self.conv3 = SNConv2d(hidden, hidden, eps=c.sn_eps)
        self.conv4 = SNConv2d(hidden, out_channels, 1, eps=c.sn_eps)
        missing = out_channels - in_channels
        self.appended = SNConv2d(in_channels, missing, 1, eps=c.sn_eps) if missing else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(x))
        h = self.conv2(F.relu(h, inplace=True))
        h = F.relu(self.conv3(F.relu(h, inplace=True)), inplace=True)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        out: Tensor = self.conv4(h) + (x if self.appended is None else torch.cat([x, self.appended(x)], 1))
        return out


class BigGANDeepDiscriminator(nn.Module):
    """D(x, y) (tables 7b to 9b): images [N, channels, R, R], classes [N] -> scores [N]."""

    def __init__(self, c: BigGANDeepConfig) -> None:
        super().__init__()
        widths = [c.discriminator_width * w for w in D_WIDTHS[c.resolution]]
        downs = 2 if c.resolution == 32 else len(widths) - 1
        self.pooling = c.pooling
        self.stem = SNConv2d(c.channels, widths[0], eps=c.sn_eps)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(_DiscriminatorBlock(c, before, after, down=i < downs))
            for _ in range(c.discriminator_depth - 1):
                self.blocks.append(_DiscriminatorBlock(c, after, after, down=False))
            if c.resolution >> min(i + 1, downs) in c.discriminator_attention:
                self.attention[str(len(self.blocks) - 1)] = SelfAttention(after, eps=c.sn_eps)
        self.linear = SNLinear(widths[-1], 1, eps=c.sn_eps)
        self.embed = SNEmbedding(c.classes, widths[-1], eps=c.sn_eps) if c.conditional else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i, block in enumerate(self.blocks):
            h = block(h)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        h = F.relu(h)
        h = h.sum((2, 3)) if self.pooling == "sum" else h.mean((2, 3))
        scores: Tensor = self.linear(h).squeeze(1)
        return scores if self.embed is None else scores + (self.embed(labels) * h).sum(1)


class BigGANDeep(BigGAN):
    """BigGAN with four times as many, thinner layers; fewer parameters and better samples at high resolution."""

    name: ClassVar[str] = "biggan-deep"
    Config: ClassVar[type[SystemConfig]] = BigGANDeepConfig
    # As in BigGAN, learning rates and steps of D are the launch scripts'; the paper's are in the job files: 5e-5 in G
    # and 2e-4 in D at 128 pixels, 2.5e-5 in both at 256 and 512 (appendix C). The paper has no model at 32 and at 64.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deep32": {
            "resolution": 32, "classes": 10, "generator_width": 64, "discriminator_width": 64,
            "generator_attention": (), "discriminator_attention": (), "init": "normal", "sn_eps": 1e-8, "d_steps": 4,
            "generator_lr": 2e-4, "discriminator_lr": 2e-4, "adam_eps": 1e-8,
        },
        "deep64": {
            "resolution": 64, "classes": 1000, "generator_width": 64, "discriminator_width": 64,
            "generator_attention": (32,), "discriminator_attention": (32,),
        },
        "deep128": {"resolution": 128, "classes": 1000},
        "deep256": {"resolution": 256, "classes": 1000},
        "deep512": {"resolution": 512, "classes": 1000},
    }  # fmt: skip

    def _build(self, config: Any) -> tuple[nn.Module, nn.Module]:
        return BigGANDeepGenerator(config), BigGANDeepDiscriminator(config)
