"""Networks of BigGAN (Brock, Donahue and Simonyan 2019, arXiv:1809.11096, appendix B), and of SAGAN and SNGAN.

All three are made of the same residual blocks. SNGAN's generator is without spectral normalisation, and without classes
there are no tables of them; everything else is widths and places of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.attention import SelfAttention
from bessemer.nn.convolutions import Linear, ResamplingConv2d
from bessemer.nn.embedding import embedding
from bessemer.nn.norm import AffineBatchNorm, BatchNorm, ConditionalBatchNorm
from bessemer.nn.resample import upsample
from bessemer.nn.spectral import SNConv2d, SNEmbedding, SNLinear

if TYPE_CHECKING:
    from bessemer.systems.adversarial.biggan import BigGANConfig, CommonConfig

__all__ = ["D_WIDTHS", "G_WIDTHS", "BigGANDiscriminator", "BigGANGenerator", "conditional_norm", "normalised"]

G_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}
"""Resolution -> channels over ch at 4x4 and after each block of G, each of which doubles the resolution."""
D_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}
"""Resolution -> channels over ch after each block of D, all of which but the last halve the resolution (two at 32)."""


def conditional_norm(c: CommonConfig, channels: int, condition_dim: int) -> BatchNorm:
    """BN whose gain and bias follow the condition of an image.

    Args:
        c: configuration.
        channels: of the feature map.
        condition_dim: length of the condition [N, condition_dim], from which SN-linear layers make both; for 0 they are
            entries of the class [N] in two tables, or, without classes, the same for all images.
    """

    def table() -> nn.Module:
        if condition_dim:
            return SNLinear(condition_dim, channels, bias=False, eps=c.sn_eps)
        return embedding(c.classes, channels)

    if not (condition_dim or c.conditional):
        return AffineBatchNorm(channels, eps=c.bn_eps, momentum=c.bn_momentum)
    return ConditionalBatchNorm(channels, table(), table(), eps=c.bn_eps, momentum=c.bn_momentum)


def normalised(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """What a layer of :func:`conditional_norm` makes of x, followed by ReLU."""
    return F.relu(norm(x) if condition is None else norm(x, condition), inplace=True)


class _GeneratorBlock(nn.Module):
    """Residual block of G that doubles the resolution (figure 15b)."""

    def __init__(self, c: BigGANConfig, in_channels: int, out_channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm1 = conditional_norm(c, in_channels, condition_dim)
        self.conv1 = _generator_conv(c, in_channels, out_channels, resample="up")
        self.norm2 = conditional_norm(c, out_channels, condition_dim)
        self.conv2 = _generator_conv(c, out_channels, out_channels)
        self.shortcut = _generator_conv(c, in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        h = self.conv1(normalised(self.norm1, x, condition))
        h = self.conv2(normalised(self.norm2, h, condition))
        # The 1×1 convolution and nearest-neighbour upsampling commute; in this order it costs a quarter.
        out: Tensor = h + upsample(self.shortcut(x))
        return out


def _generator_conv(
    c: BigGANConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    resample: Literal["up", "down"] | None = None,
) -> ResamplingConv2d:
    if c.generator_spectral:
        return SNConv2d(in_channels, out_channels, kernel_size, resample=resample, eps=c.sn_eps)
    return ResamplingConv2d(in_channels, out_channels, kernel_size, resample=resample)


class BigGANGenerator(nn.Module):
    """G(z, y) (table 4a): z [N, latent_dim] and classes [N] -> images [N, channels, R, R] in [-1, 1]."""

    def __init__(self, c: BigGANConfig) -> None:
        super().__init__()
        widths = [c.generator_width * w for w in G_WIDTHS[c.resolution]]
        self.chunk = c.latent_dim // len(widths) if c.hierarchical else c.latent_dim
        self.hierarchical, self.conditional = c.hierarchical, c.conditional
        # Without a shared embedding each normalisation layer looks the class up in its own table.
        shared_dim = c.shared_dim if c.conditional else 0
        condition_dim = shared_dim + self.chunk * c.hierarchical
        # Without spectral norm, which cripples G at random here (BigGAN-PyTorch).
        self.shared = embedding(c.classes, shared_dim) if shared_dim else None
        first = widths[0] * 4 * 4
        spectral = c.generator_spectral
        self.linear = SNLinear(self.chunk, first, eps=c.sn_eps) if spectral else Linear(self.chunk, first)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(_GeneratorBlock(c, before, after, condition_dim))
            if 8 << i in c.generator_attention:
                self.attention[str(i)] = SelfAttention(after, eps=c.sn_eps)
        self.norm = AffineBatchNorm(widths[-1], eps=c.bn_eps, momentum=c.bn_momentum)
        self.conv = _generator_conv(c, widths[-1], c.channels)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        z, *chunks = torch.split(z, self.chunk, 1)
        conditions = self._conditions(labels, chunks)
        h = self.linear(z).view(z.shape[0], -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for i, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            h = block(h, condition)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return torch.tanh(self.conv(F.relu(self.norm(h), inplace=True)))

    def _conditions(self, labels: Tensor, chunks: list[Tensor]) -> Sequence[Tensor | None]:
        """What each block's normalisation depends on: class, chunk of z, both, or nothing."""
        if not self.conditional:
            return chunks if self.hierarchical else [None] * len(self.blocks)
        condition = labels if self.shared is None else self.shared(labels)
        if not self.hierarchical:
            return [condition] * len(self.blocks)
        return [torch.cat([condition, chunk], 1) for chunk in chunks]


class _DiscriminatorBlock(nn.Module):
    """Residual block of D (figure 15c); the first of a network sees images and has no ReLU before it."""

    def __init__(self, c: BigGANConfig, in_channels: int, out_channels: int, *, first: bool, down: bool) -> None:
        super().__init__()
        hidden = in_channels if c.thin_discriminator else out_channels
        self.first, self.down = first, down
        self.conv1 = SNConv2d(in_channels, hidden, eps=c.sn_eps)
        self.conv2 = SNConv2d(hidden, out_channels, resample="down" if down else None, eps=c.sn_eps)
        learned = in_channels != out_channels or (down and c.shortcut == "resampled")
        self.shortcut = SNConv2d(in_channels, out_channels, 1, eps=c.sn_eps) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h, inplace=True))
        # Average pooling and the 1×1 convolution commute; in this order it costs a quarter.
        x = F.avg_pool2d(x, 2) if self.down else x
        out: Tensor = h + (x if self.shortcut is None else self.shortcut(x))
        return out


class BigGANDiscriminator(nn.Module):
    """D(x, y) (table 4b), a projection discriminator: images [N, channels, R, R] and classes [N] -> scores [N]."""

    def __init__(self, c: BigGANConfig) -> None:
        super().__init__()
        widths = [c.channels, *(c.discriminator_width * w for w in D_WIDTHS[c.resolution])]
        downs = 2 if c.resolution == 32 else len(widths) - 2
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(_DiscriminatorBlock(c, before, after, first=i == 0, down=i < downs))
            # BigGAN-PyTorch takes all four blocks for 16×16 at 32 px (three are 8×8); so do its parameter counts.
            resolution = c.resolution >> min(i + 1, downs)
            resolution = 16 if c.resolution == 32 and not c.attention_once else resolution
            if resolution in c.discriminator_attention:
                self.attention[str(i)] = SelfAttention(after, eps=c.sn_eps)
        self.linear = SNLinear(widths[-1], 1, eps=c.sn_eps)
        self.embed = SNEmbedding(c.classes, widths[-1], eps=c.sn_eps) if c.conditional else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = x.contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            h = block(h)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        h = F.relu(h).sum((2, 3))
        scores: Tensor = self.linear(h).squeeze(1)
        return scores if self.embed is None else scores + (self.embed(labels) * h).sum(1)
