"""Networks of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), and of StyleGAN2-ADA where labels are concerned.

Layers of the highest resolutions may run in half precision; everything else keeps out of autocast (Karras et al. 2020,
Training Generative Adversarial Networks with Limited Data, arXiv:2006.06676, appendix D).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bessemer.nn.equalised import EqualisedConv2d, EqualisedLinear, Initialised
from bessemer.nn.modulated import ModulatedConv2d
from bessemer.nn.precision import full_precision
from bessemer.nn.update_state import UpdateStateLayer
from bessemer.nn.upfirdn import upsample
from bessemer.systems.adversarial.ada import Augmentation

if TYPE_CHECKING:
    from bessemer.systems.adversarial.stylegan2 import StyleGAN2Config

__all__ = [
    "MappingNetwork",
    "MovingMean",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "SynthesisNetwork",
    "minibatch_deviation",
]

_HALF = (torch.float16, torch.bfloat16)


class MovingMean(UpdateStateLayer):
    """Moving average of a vector over slices, one step per update towards the mean over the slices of all workers.

    Args:
        size: length of the vector.
        rate: share of an update's mean in the new average.
    """

    mean: Tensor
    total: Tensor
    slices: Tensor

    def __init__(self, size: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("total", torch.zeros(size), persistent=False)
        self.register_buffer("slices", torch.zeros(1), persistent=False)

    def begin_update(self) -> None:
        self.total.zero_()
        self.slices.zero_()

    def pending(self) -> list[Tensor]:
        return [self.total, self.slices]

    def end_update(self) -> None:
        weight = self.rate * (self.slices > 0).to(self.mean.dtype)
        self.mean.lerp_(self.total / self.slices.clamp(min=1), weight)

    @torch.no_grad()
    def observe(self, value: Tensor) -> None:
        """Count the value [size] of one slice; in training only."""
        if self.training:
            self.total += value.detach()
            self.slices += 1


def _normalised(x: Tensor) -> Tensor:
    """Vectors [N, size] scaled to a mean square of one."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """f: z [N, latent_dim] and classes [N] -> w [N, w_dim]; without z for the discriminator, which embeds classes."""

    def __init__(self, c: StyleGAN2Config, layers: int, *, latent: bool = True) -> None:
        super().__init__()
        self.embed = EqualisedLinear(c.classes, c.w_dim) if c.conditional else None
        inputs = c.latent_dim * latent + c.w_dim * c.conditional
        self.layers = nn.Sequential(
            *(
                EqualisedLinear(c.w_dim if i else inputs, c.w_dim, activate=True, lr_factor=c.mapping_lr_factor)
                for i in range(layers)
            )
        )

    def forward(self, z: Tensor | None, labels: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        parts = [] if z is None else [_normalised(z.to(dtype))]
        with full_precision(labels):
            if self.embed is not None:
                one_hot = F.one_hot(labels, self.embed.weight.shape[1]).to(dtype)
                parts.append(_normalised(self.embed(one_hot)))
            w: Tensor = self.layers(torch.cat(parts, 1))
        return w


def _enter(x: Tensor, half: bool) -> tuple[Tensor, AbstractContextManager[object]]:
    """Bring x to the type that a block computes in, and give the context for it: autocast's, if `half`."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if half and autocast:
        return x.to(torch.get_autocast_dtype(device)), nullcontext()
    return x.float() if x.dtype in _HALF else x, full_precision(x)


class _SynthesisBlock(nn.Module):
    """Two convolutions of one resolution (one at 4×4) and the layer that makes colours (figures 2d and 7b)."""

    def __init__(self, c: StyleGAN2Config, in_channels: int, resolution: int) -> None:
        super().__init__()
        out, clamp = c.width(resolution), c.clamp
        self.in_half = c.is_half(resolution)
        self.convs = nn.ModuleList()
        if in_channels:
            self.convs.append(ModulatedConv2d(in_channels, out, c.w_dim, up=True, clamp=clamp))
        self.convs.append(ModulatedConv2d(out, out, c.w_dim, clamp=clamp))
        self.to_rgb = ModulatedConv2d(out, c.channels, c.w_dim, 1, colour=True, clamp=clamp)

    def forward(
        self, x: Tensor, image: Tensor | None, ws: Sequence[Tensor], noise: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Features [N, C, R/2, R/2], image of that size; a w for each layer and noise -> those of size R."""
        x, context = _enter(x, self.in_half)
        with context:
            for conv, w, n in zip(self.convs, ws[:-1], noise, strict=True):
                x = conv(x, w, n)
            colours = self.to_rgb(x, ws[-1])
        colours = colours.float() if colours.dtype in _HALF else colours
        return x, colours if image is None else upsample(image) + colours


class SynthesisNetwork(Initialised):
    """g: w for each layer and noise -> image, with skip connections for colours (figure 7b)."""

    def __init__(self, c: StyleGAN2Config) -> None:
        super().__init__()
        resolutions = [2**k for k in range(2, c.resolution.bit_length())]
        self.const = nn.Parameter(torch.zeros(c.width(4), 4, 4))
        before = [0, *(c.width(r) for r in resolutions[:-1])]
        self.blocks = nn.ModuleList(
            _SynthesisBlock(c, channels, r) for channels, r in zip(before, resolutions, strict=True)
        )
        self.noise_sizes = [r for r in resolutions for _ in range(1 if r == 4 else 2)]
        """Resolution of every convolution."""
        self.num_ws = len(self.noise_sizes) + 1
        """Vectors w: one per convolution and one for the last layer that makes colours; the others share the w of the
        convolution that follows them."""

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        self.const.normal_(generator=generator)

    def draw_noise(self, n: int, generator: Generator) -> list[Tensor]:
        """Noise [n, 1, R, R] for every convolution, N(0, 1)."""
        return [torch.randn((n, 1, r, r), generator=generator, device=generator.device) for r in self.noise_sizes]

    def forward(self, ws: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Synthesise images.

        Args:
            ws: [N, num_ws, w_dim].
            noise: as :meth:`draw_noise` makes it; one image's noise may serve all.

        Returns:
            [N, channels, R, R], around [-1, 1] but not bounded.
        """
        x: Tensor = self.const.expand(ws.shape[0], -1, -1, -1)
        image: Tensor | None = None
        at = 0
        for i, block in enumerate(self.blocks):
            convs = 2 if i else 1
            x, image = block(x, image, ws[:, at : at + convs + 1].unbind(1), noise[at : at + convs])
            at += convs
        assert image is not None
        return image


class StyleGAN2Generator(nn.Module):
    """G: mapping and synthesis, the average of w, and the average length of path gradients (a in equation 4)."""

    def __init__(self, c: StyleGAN2Config) -> None:
        super().__init__()
        self.mapping = MappingNetwork(c, c.mapping_layers)
        self.synthesis = SynthesisNetwork(c)
        self.w_average = MovingMean(c.w_dim, c.w_average_rate)
        self.path_length = MovingMean(1, c.path_length_rate)

    def map(self, z: Tensor, labels: Tensor) -> Tensor:
        """Map z [N, latent_dim] and classes [N] to w [N, w_dim], which the average takes in while training."""
        w: Tensor = self.mapping(z, labels)
        self.w_average.observe(w.mean(0))
        return w

    def broadcast(self, w: Tensor, truncation: float | None = None) -> Tensor:
        """The same w [N, w_dim] for each layer, [N, num_ws, w_dim]; ψ < 1 pulls it towards the average w."""
        if truncation is not None:
            w = torch.lerp(self.w_average.mean, w, truncation)
        return w[:, None].expand(-1, self.synthesis.num_ws, -1)


def minibatch_deviation(x: Tensor, group: int) -> Tensor:
    """Append to each image how much the images of its group differ (ProGAN, section 3).

    Args:
        x: [N, C, H, W].
        group: images per group; where it does not divide N, the largest smaller number that does.

    Returns:
        [N, C + 1, H, W]: the mean over the features of the standard deviation over the group, everywhere. Image i
        belongs to group i mod N/group.
    """
    n, _, height, width = x.shape
    group = max(g for g in range(1, min(group, n) + 1) if n % g == 0)
    grouped = x.reshape(group, n // group, -1)
    deviation = (grouped.var(0, unbiased=False) + 1e-8).sqrt().mean(1)  # [N/group]
    return torch.cat([x, deviation.repeat(group).view(n, 1, 1, 1).expand(-1, -1, height, width)], 1)


class _DiscriminatorBlock(nn.Module):
    """Two convolutions, the second of which halves the size, and a residual connection (figure 7c)."""

    def __init__(self, c: StyleGAN2Config, resolution: int) -> None:
        super().__init__()
        before, after, clamp = c.width(resolution), c.width(resolution // 2), c.clamp
        residual = c.discriminator == "residual"
        gain = 0.5**0.5 if residual else 1.0  # the sum keeps the variance
        self.in_half = c.is_half(resolution)
        first = resolution == c.resolution
        self.from_rgb = EqualisedConv2d(c.channels, before, 1, clamp=clamp) if first else None
        self.conv1 = EqualisedConv2d(before, before, clamp=clamp)
        self.conv2 = EqualisedConv2d(before, after, down=True, gain=gain, clamp=clamp)
        self.skip = (
            EqualisedConv2d(before, after, 1, bias=False, activate=False, down=True, gain=gain) if residual else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, R, R], or images for the first block -> [N, C', R/2, R/2]."""
        x, context = _enter(x, self.in_half)
        with context:
            x = x if self.from_rgb is None else self.from_rgb(x)
            y: Tensor = self.conv2(self.conv1(x))
            return y if self.skip is None else y + self.skip(x)


class StyleGAN2Discriminator(nn.Module):
    """D(x, y): images [N, channels, R, R] and classes [N] -> scores [N] (figure 7c).

    With labels it is a projection discriminator: its output is compared with an embedding of the class.

    Attributes:
        augment: what images must pass before they are judged, or None; its state is kept here.
    """

    def __init__(self, c: StyleGAN2Config) -> None:
        super().__init__()
        width = c.width(4)
        self.group = c.minibatch_group
        self.blocks = nn.ModuleList(_DiscriminatorBlock(c, 2**k) for k in range(c.resolution.bit_length() - 1, 2, -1))
        self.conv = EqualisedConv2d(width + 1, width)
        self.linear = EqualisedLinear(width * 4 * 4, width, activate=True)
        self.out = EqualisedLinear(width, c.w_dim if c.conditional else 1)
        self.mapping = MappingNetwork(c, 8, latent=False) if c.conditional else None
        self.augment = Augmentation(c.augment_p) if c.augment == "bgc" else None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        x, context = _enter(x, half=False)
        with context:
            x = self.conv(minibatch_deviation(x, self.group))
            scores: Tensor = self.out(self.linear(x.flatten(1)))
            if self.mapping is not None:
                embedding = _normalised(self.mapping(None, labels))
                scores = (scores * embedding).sum(1, keepdim=True) * scores.shape[1] ** -0.5
        return scores.squeeze(1)
