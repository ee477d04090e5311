"""Networks of DVD-GAN (Clark, Donahue and Simonyan 2019, arXiv:1907.06571, section 3 and appendix A).

Outside the recurrent units and the temporal discriminator's first blocks each frame is an image of its own: the time
dimension is folded into the batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.conv_gru import ConvGRU
from bessemer.nn.embedding import embedding
from bessemer.nn.norm import ConditionalBatchNorm
from bessemer.nn.resample import upsample
from bessemer.nn.spectral import SNConv2d, SNConv3d, SNEmbedding, SNLinear

if TYPE_CHECKING:
    from bessemer.systems.video.dvdgan import DVDGANConfig

__all__ = ["D_WIDTHS", "G_WIDTHS", "DVDGANDiscriminator", "DVDGANGenerator", "FrameNorm", "pooled"]

G_WIDTHS = {
    16: (4, 4, 2),
    32: (8, 8, 4, 2),
    64: (8, 8, 8, 4, 2),
    128: (8, 8, 8, 4, 2, 1),
    256: (8, 8, 8, 4, 4, 2, 1),
}
"""Resolution -> channels over ch at 4x4 and after each stage of G, which doubles the resolution; ours, see `dvdgan`."""
D_WIDTHS = {
    16: (2, 4, 4),
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
"""Resolution -> channels over ch after each block of both discriminators; from 32 pixels on BigGAN's, 16 is ours."""


class _PerFrame(nn.Module):
    """A gain or bias [N, C] for each of T frames: [N, T·C]."""

    def __init__(self, condition_dim: int, channels: int, frames: int, eps: float) -> None:
        super().__init__()
        self.frames = frames
        self.linear = SNLinear(condition_dim, channels, bias=False, eps=eps)

    def forward(self, condition: Tensor) -> Tensor:
        values: Tensor = self.linear(condition).repeat(1, self.frames)
        return values


class FrameNorm(nn.Module):
    """Class-conditional BN with statistics of its own for each frame, followed by ReLU.

    Statistics over time would tell each frame about the others (section 3.1); gain and bias are the same for all.
    """

    def __init__(self, c: DVDGANConfig, channels: int) -> None:
        super().__init__()
        dim = c.latent_dim + c.shared_dim
        gain, bias = (_PerFrame(dim, channels, c.frames, c.sn_eps) for _ in range(2))
        self.frames = c.frames
        self.norm = ConditionalBatchNorm(c.frames * channels, gain, bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[N·T, C, H, W] and [N, features] -> the shape of x."""
        of_clips = x.reshape(-1, self.frames * x.shape[1], *x.shape[2:])
        return F.relu(self.norm(of_clips, condition).reshape(x.shape), inplace=True)


class _GeneratorBlock(nn.Module):
    """BigGAN's residual block of G; `up` doubles the resolution."""

    def __init__(self, c: DVDGANConfig, in_channels: int, out_channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.norm1, self.norm2 = FrameNorm(c, in_channels), FrameNorm(c, out_channels)
        self.conv1 = SNConv2d(in_channels, out_channels, resample="up" if up else None, eps=c.sn_eps)
        self.conv2 = SNConv2d(out_channels, out_channels, eps=c.sn_eps)
        learned = up or in_channels != out_channels
        self.shortcut = SNConv2d(in_channels, out_channels, 1, eps=c.sn_eps) if learned else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x, condition)), condition))
        x = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = h + (upsample(x) if self.up else x)
        return out


class _Stage(nn.Module):
    """A recurrent unit, and two residual blocks of which the second doubles the resolution."""

    def __init__(self, c: DVDGANConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.frames = c.frames
        self.gru = ConvGRU(in_channels, eps=c.sn_eps)
        self.keep = _GeneratorBlock(c, in_channels, in_channels, up=False)
        self.grow = _GeneratorBlock(c, in_channels, out_channels, up=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[N, T or 1, C, H, W] -> [N, T, C', 2H, 2W]."""
        h = self.gru(x, self.frames).flatten(0, 1)
        out: Tensor = self.grow(self.keep(h, condition), condition)
        return out.view(-1, self.frames, *out.shape[1:])


class DVDGANGenerator(nn.Module):
    """G(z, y): z [N, latent_dim] and classes [N] -> clips [N, frames, channels, R, R] in [-1, 1]."""

    def __init__(self, c: DVDGANConfig) -> None:
        super().__init__()
        widths = [c.generator_width * w for w in G_WIDTHS[c.resolution]]
        self.shared = embedding(c.classes, c.shared_dim)
        self.linear = SNLinear(c.latent_dim + c.shared_dim, widths[0] * 4 * 4, eps=c.sn_eps)
        self.stages = nn.ModuleList(_Stage(c, before, after) for before, after in pairwise(widths))
        self.norm = FrameNorm(c, widths[-1])
        self.conv = SNConv2d(widths[-1], c.channels, eps=c.sn_eps)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        condition = torch.cat([z, self.shared(labels)], 1)
        h = self.linear(condition).view(z.shape[0], 1, -1, 4, 4)  # the same input at every frame
        for stage in self.stages:
            h = stage(h, condition)
        frames: Tensor = torch.tanh(self.conv(self.norm(h.flatten(0, 1), condition)))
        return frames.view(*h.shape[:2], *frames.shape[1:])


class _DiscriminatorBlock(nn.Module):
    """BigGAN's residual block of D, for frames or, `cubic`, with 3×3×3 convolutions for clips; `down` halves all sizes.

    The first of a network sees pixels and has no ReLU before it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, first: bool, down: bool, cubic: bool, eps: float
    ) -> None:
        super().__init__()
        self.first, self.cubic = first, cubic
        self.down = down
        conv = SNConv3d if cubic else SNConv2d
        self.conv1 = conv(in_channels, out_channels, eps=eps)
        self.conv2 = conv(out_channels, out_channels, eps=eps)
        learned = down or in_channels != out_channels
        self.shortcut = conv(in_channels, out_channels, 1, eps=eps) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self._pool(self.conv2(F.relu(h, inplace=True)))
        x = self._pool(x)
        out: Tensor = h + (x if self.shortcut is None else self.shortcut(x))
        return out

    def _pool(self, x: Tensor) -> Tensor:
        if not self.down:
            return x
        return F.avg_pool3d(x, 2) if self.cubic else F.avg_pool2d(x, 2)


class _Judge(nn.Module):
    """A projection discriminator of clips, the first of whose blocks may look across frames: [N, T, C, H, W] -> [N]."""

    def __init__(self, c: DVDGANConfig, cubic: int) -> None:
        super().__init__()
        widths = [c.channels, *(c.discriminator_width * w for w in D_WIDTHS[c.resolution])]
        downs = 2 if c.resolution == 32 else len(widths) - 2
        self.cubic = cubic
        self.blocks = nn.ModuleList(
            _DiscriminatorBlock(before, after, first=i == 0, down=i < downs, cubic=i < cubic, eps=c.sn_eps)
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.linear = SNLinear(widths[-1], 1, eps=c.sn_eps)
        self.embed = SNEmbedding(c.classes, widths[-1], eps=c.sn_eps)

    def forward(self, clips: Tensor, labels: Tensor) -> Tensor:
        h = clips.transpose(1, 2)
        for block in self.blocks[: self.cubic]:
            h = block(h)
        h = h.transpose(1, 2)
        n, t = h.shape[:2]
        h = h.flatten(0, 1)
        for block in self.blocks[self.cubic :]:
            h = block(h)
        h = F.relu(h).sum((2, 3)).view(n, t, -1)
        scores: Tensor = self.linear(h).squeeze(2) + (h * self.embed(labels)[:, None]).sum(2)
        return scores.sum(1)


def pooled(clips: Tensor) -> Tensor:
    """φ, what the temporal discriminator sees: each frame at half the resolution, averaged over 2×2 pixels."""
    small = F.avg_pool2d(clips.flatten(0, 1), 2)
    return small.view(*clips.shape[:2], *small.shape[1:])


class DVDGANDiscriminator(nn.Module):
    """D_S and D_T: how real k whole frames look one by one, and how real the small clip moves (section 3.2)."""

    def __init__(self, c: DVDGANConfig) -> None:
        super().__init__()
        self.spatial, self.temporal = _Judge(c, cubic=0), _Judge(c, cubic=2)

    def forward(self, clips: Tensor, chosen: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of D_S and of D_T.

        Args:
            clips: [N, T, C, R, R].
            chosen: [N, k] int64, frames of each clip that D_S sees; it computes nothing of the others.
            labels: [N].

        Returns:
            [N] each, sums over frames.
        """
        rows = torch.arange(len(clips), device=clips.device)[:, None]
        return self.spatial(clips[rows, chosen], labels), self.temporal(pooled(clips), labels)
