"""Pix2Pix (Isola et al. 2017, arXiv:1611.07004): a conditional GAN that translates images, learned from pairs.

The networks are those of appendix 6.1. The paper's batch normalisation takes the statistics of the test batch when it
samples. Where batches hold one image, as for the facades, that is instance normalisation, which stands here for every
batch size (the paper has 4 images for edges and shoes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Conv2d, DoublingConv2d, HalvingConv2d
from bessemer.nn.init import init_weights
from bessemer.nn.instance_norm import InstanceNorm
from bessemer.nn.jitter import jitter
from bessemer.nn.unset import Unset
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.translating import TranslationSystem

__all__ = ["PatchDiscriminator", "Pix2Pix", "Pix2PixConfig", "UNet"]

Count = Annotated[int, Field(ge=1)]

_DROPOUT = 0.5
_DROPPED = 3
"""Layers of the decoder with dropout, the first ones."""


class Pix2PixConfig(SystemConfig):
    """Configuration of Pix2Pix; the defaults are those of the facades."""

    resolution: Annotated[int, Field(ge=16)] = 256
    """Height and width of the images in pixels, a power of two."""
    channels: Count = 3
    """Colour channels of the inputs."""
    target_channels: Count = 3
    """Colour channels of the targets."""
    width: Count = 64
    """Channels of the generator's first layer; later ones have up to 8 times as many."""
    discriminator_width: Count = 64
    """Channels of the discriminator's first layer, likewise."""
    patch_layers: Annotated[int, Field(ge=0, le=6)] = 3
    """Layers of the discriminator that halve the image: it judges patches of 1, 16, 34, 70, 142, 286 or 574 pixels."""
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 100.0
    """λ, weight of the L1 distance to the target."""
    jitter: Annotated[int, Field(ge=0)] = 30
    """Pixels by which pairs are enlarged before they are cropped back at a random place; 0 for none."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Adam's learning rate in both networks."""

    @model_validator(mode="after")
    def _check(self) -> Pix2PixConfig:
        if self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution: {self.resolution} is no power of two, and the U-Net halves it down to 1")
        if self.resolution < (least := 4 << self.patch_layers):
            raise ValueError(
                f"patch_layers: {self.patch_layers} need a resolution of {least}, which is {self.resolution}"
            )
        return self


class UNet(nn.Module):
    """G(x, z): an encoder down to one pixel, and a decoder whose layers see the encoder's of their size, too.

    C64-C128-C256-C512-C512-C512-C512-C512, and CD512-CD512-CD512-C512-C256-C128-C64 back, at 256 pixels. z is dropout.
    """

    def __init__(self, c: Pix2PixConfig) -> None:
        super().__init__()
        levels = c.resolution.bit_length() - 1
        widths = [c.width * min(2**level, 8) for level in range(levels)]
        inputs = [c.channels, *widths[:-1]]
        self.down = nn.ModuleList(HalvingConv2d(i, o, bias=False) for i, o in zip(inputs, widths, strict=True))
        # Neither the first layer nor the last, whose one pixel would always be 0.
        self.down_norm = nn.ModuleList(InstanceNorm(w, affine=True) for w in widths[1:-1])
        joined = [widths[-1], *(2 * w for w in reversed(widths[:-1]))]
        outputs = widths[-2::-1]
        self.up = nn.ModuleList(DoublingConv2d(i, o, bias=False) for i, o in zip(joined, outputs, strict=False))
        self.up_norm = nn.ModuleList(InstanceNorm(w, affine=True) for w in outputs)
        self.out = DoublingConv2d(joined[-1], c.target_channels)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Maps of all levels, [N, widths[i], R/2^(i+1), R/2^(i+1)], before their activation."""
        maps = [self.down[0](x)]
        for i, layer in enumerate(self.down[1:]):
            h = layer(F.leaky_relu(maps[-1], 0.2))
            maps.append(self.down_norm[i](h) if i < len(self.down_norm) else h)
        return maps

    def forward(self, x: Tensor, generator: Generator) -> Tensor:
        """[N, channels, R, R] -> [N, target_channels, R, R] in [-1, 1]; `generator` draws what is dropped."""
        *skips, h = self.encode(x)
        for i, (layer, norm) in enumerate(zip(self.up, self.up_norm, strict=True)):
            h = norm(layer(F.relu(h)))
            if i < min(_DROPPED, len(self.up) - 1):
                kept = torch.rand(h.shape, generator=generator, device=generator.device) >= _DROPOUT
                h = h * kept.to(h.dtype) / (1 - _DROPOUT)
            h = torch.cat([h, skips.pop()], 1)
        return torch.tanh(self.out(F.relu(h)))


class _PatchConv(Unset, nn.Conv2d):
    """A 4×4 convolution that takes one pixel off each side."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 4, 1, 1, bias=bias)


class PatchDiscriminator(nn.Module):
    """D: images -> log odds of each patch, [N, 1, H', W']; the PatchGAN of section 3.2.2.

    C64-C128-C256-C512 and a last convolution judge patches of 70×70 pixels; fewer layers judge smaller ones, and
    without any halving it is the PixelGAN, of 1×1 convolutions.

    Args:
        channels: of the images, of condition and image together.
        width: channels of the first layer.
        layers: those that halve.
        affine: whether normalisation has a gain and a bias, in place of the convolution's bias.
    """

    def __init__(self, channels: int, width: int, layers: int, *, affine: bool) -> None:
        super().__init__()

        def unit(conv: nn.Module, channels: int) -> list[nn.Module]:
            return [conv, InstanceNorm(channels, affine=affine), nn.LeakyReLU(0.2)]

        bias = not affine
        if layers == 0:
            self.layers = nn.Sequential(
                Conv2d(channels, width, 1), nn.LeakyReLU(0.2),
                *unit(Conv2d(width, 2 * width, 1, bias=bias), 2 * width),
                Conv2d(2 * width, 1, 1, bias=bias),
            )  # fmt: skip
            return
        widths = [width * min(2**level, 8) for level in range(layers + 1)]
        stack: list[nn.Module] = [HalvingConv2d(channels, width), nn.LeakyReLU(0.2)]
        for i, o in pairwise(widths[:-1]):
            stack += unit(HalvingConv2d(i, o, bias=bias), o)
        stack += unit(_PatchConv(widths[-2], widths[-1], bias=bias), widths[-1])
        self.layers = nn.Sequential(*stack, _PatchConv(widths[-1], 1))

    def forward(self, *images: Tensor) -> Tensor:
        """Images [N, C, R, R], put together by their channels -> [N, 1, H', W']; 30×30 for 70×70 patches of 256."""
        scores: Tensor = self.layers(torch.cat(images, 1))
        return scores


class Pix2Pix(TranslationSystem):
    """Conditional GAN from images to their targets: an adversarial loss of patches, and the L1 distance."""

    name: ClassVar[str] = "pix2pix"
    family: ClassVar[str] = "translation"
    paper: ClassVar[str] = (
        "P. Isola, J.-Y. Zhu, T. Zhou, A. A. Efros: Image-to-Image Translation with Conditional Adversarial Networks, "
        "CVPR 2017, arXiv:1611.07004"
    )
    modality: ClassVar[str] = "pairs of images"
    takes: ClassVar[tuple[str, ...]] = ("images", "targets")
    data_fields: ClassVar[tuple[str, ...]] = ("channels", "target_channels", "classes")
    Config: ClassVar[type[SystemConfig]] = Pix2PixConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny32": {"resolution": 32, "width": 24, "discriminator_width": 24, "patch_layers": 1, "jitter": 2},
        "facades": {},
        "edges2shoes": {"jitter": 0},
        "facades-pixelgan": {"patch_layers": 0},
        "facades-patch16": {"patch_layers": 1},
        "facades-imagegan": {"patch_layers": 5},
    }

    config: Pix2PixConfig

    def __init__(self, config: Pix2PixConfig) -> None:
        self.config = c = config
        self.generator = UNet(c)
        seen = c.channels + c.target_channels
        self.discriminator = PatchDiscriminator(seen, c.discriminator_width, c.patch_layers, affine=True)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return dict.fromkeys(self.networks(), OptimizerDefaults("adam", lr=self.config.lr, betas=(0.5, 0.999)))

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [
            Update("discriminator", "discriminator", self.discriminator_loss),
            Update("generator", "generator", self.generator_loss),
        ]

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            init_weights(network, generator, "normal", biases="zeros")

    def _pair(self, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
        """The pair (x, y), jittered alike."""
        x, y = jitter([batch.images, batch["targets"]], self.config.jitter, generator)
        return x, y

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Half of -E[log D(x, y)] - E[log(1 - D(x, G(x, z)))] (eq. 1 and section 3.3), over all patches."""
        x, y = self._pair(batch, generator)
        with torch.no_grad():
            fake = self.generator(x, generator).to(y.dtype)
        real, made = self.discriminator(x, y), self.discriminator(x, fake)
        value = (F.softplus(-real).mean() + F.softplus(made).mean()) / 2
        return Loss(value, {"scores/real": real.mean().detach(), "scores/fake": made.mean().detach()})

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """-E[log D(x, G(x, z))] + λ·E[|y - G(x, z)|] (eq. 4, the first term turned round as in section 3.3)."""
        x, y = self._pair(batch, generator)
        fake = self.generator(x, generator)
        adversarial = F.softplus(-self.discriminator(x, fake.to(y.dtype))).mean()
        distance = (y - fake).abs().mean()
        scalars = {"distance/adversarial": adversarial.detach(), "distance/l1": distance.detach()}
        return Loss(adversarial + self.config.l1 * distance, scalars)

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    @torch.no_grad()
    def sample_for(self, batch: Batch, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Translate images, dropping at random as in training: that is the noise (section 3.2)."""
        images: Tensor = self.generator(batch.images, generator)
        return images.float()
