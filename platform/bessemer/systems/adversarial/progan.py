"""ProGAN (Karras et al. 2018, arXiv:1710.10196): both networks grow with the image clock, resolution by resolution.

The layers are those of table 2, the schedule and the loss those of appendix A. Optimisers begin anew whenever other
layers are at work, at the beginning of each fade and at its end, as in the authors' code. The batch keeps its size; the
authors' shrinks from 16 to 3 for want of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from bessemer.nn.equalised import EqualisedConv2d, EqualisedLinear, Initialised
from bessemer.nn.latents import normal_latents
from bessemer.nn.penalties import interpolated_penalty
from bessemer.nn.resample import upsample
from bessemer.nn.values import has_values
from bessemer.systems.adversarial.stylegan2_networks import minibatch_deviation
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, Stage, SystemConfig, Update
from bessemer.systems.latent import LatentSystem

__all__ = ["Growth", "ProGAN", "ProGANConfig", "ProGANDiscriminator", "ProGANGenerator", "pixel_norm"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ProGANConfig(SystemConfig):
    """Configuration of ProGAN; the defaults are those of the CelebA-HQ model."""

    resolution: Literal[8, 16, 32, 64, 128, 256, 512, 1024] = 1024
    """Height and width of the images in pixels."""
    channels: Count = 3
    """Colour channels."""
    latent_dim: Count = 512
    """Dimension of z."""
    channel_base: Count = 8192
    """Feature maps times resolution over 2, until `channel_max`."""
    channel_max: Count = 512
    """Most feature maps of a layer."""
    fade_kimg: Positive = 800.0
    """Images, in thousands, in which a new resolution is faded in."""
    stable_kimg: Positive = 800.0
    """Images, in thousands, for which a resolution is trained before the next one comes."""
    penalty: Weight = 10.0
    """λ, weight of the gradient penalty."""
    target: Positive = 1.0
    """Norm of the gradient without penalty, by whose square the weight is divided; 750 on CIFAR-10."""
    drift: Weight = 1e-3
    """Weight of the squared scores of real images, which keeps them from drifting."""
    minibatch_group: Count = 16
    """Images whose standard deviation the discriminator sees, at most a slice; all 16 of a batch in the paper."""
    lr: Positive = 1e-3
    """Adam's learning rate in both networks."""

    @property
    def levels(self) -> int:
        """Resolutions, from 4 pixels on."""
        return self.resolution.bit_length() - 2

    def width(self, level: int) -> int:
        """Feature maps at 4·2^level pixels."""
        return min(self.channel_base >> (level + 1), self.channel_max)


class Growth(NamedTuple):
    """How far the networks have grown."""

    level: int
    """Index of the resolution; 0 is 4 pixels."""
    alpha: float
    """How far it is faded in, from 0 to 1."""


def pixel_norm(x: Tensor) -> Tensor:
    """Divide each pixel's feature vector by its root mean square (section 4.2): [N, C, ...] -> the same shape."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class _GeneratorBlock(nn.Module):
    """Doubles the resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualisedConv2d(in_channels, out_channels)
        self.conv2 = EqualisedConv2d(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(self.conv2(pixel_norm(self.conv1(upsample(x)))))


class ProGANGenerator(nn.Module):
    """G: z [N, latent_dim] -> images at the resolution that has been reached."""

    progress: Tensor
    """[2]: the :class:`Growth` of the present, for sampling."""

    def __init__(self, c: ProGANConfig) -> None:
        super().__init__()
        widths = [c.width(level) for level in range(c.levels)]
        self.first = EqualisedLinear(c.latent_dim, widths[0] * 16)
        self.first.bias = nn.Parameter(torch.zeros(widths[0]))  # one for each feature map
        self.conv = EqualisedConv2d(widths[0], widths[0])
        self.blocks = nn.ModuleList(_GeneratorBlock(a, b) for a, b in pairwise(widths))
        self.to_rgb = nn.ModuleList(EqualisedConv2d(w, c.channels, 1, activate=False) for w in widths)
        self.register_buffer("progress", torch.tensor([0.0, 1.0]))

    def forward(self, z: Tensor, growth: Growth) -> Tensor:
        """[N, channels, 4·2^level, 4·2^level]; at α < 1 mixed with what the level before shows (figure 2)."""
        z = pixel_norm(z)
        weight = self.first.weight * self.first.weight.shape[1] ** -0.5 / 4  # the authors' gain of a quarter
        h = F.linear(z, weight).view(z.shape[0], -1, 4, 4) + self.first.bias.view(1, -1, 1, 1)
        h = pixel_norm(F.leaky_relu(h, 0.2) * 2**0.5)
        h = pixel_norm(self.conv(h))
        before = h
        for block in list(self.blocks)[: growth.level]:
            before, h = h, block(h)
        images: Tensor = self.to_rgb[growth.level](h)
        if growth.alpha < 1 and growth.level:
            images = torch.lerp(upsample(self.to_rgb[growth.level - 1](before)), images, growth.alpha)
        return images


class ProGANDiscriminator(nn.Module):
    """D: images at the resolution that has been reached -> scores [N]."""

    def __init__(self, c: ProGANConfig) -> None:
        super().__init__()
        widths = [c.width(level) for level in range(c.levels)]
        self.from_rgb = nn.ModuleList(EqualisedConv2d(c.channels, w, 1) for w in widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(EqualisedConv2d(b, b), EqualisedConv2d(b, a)) for a, b in pairwise(widths)
        )
        self.group = c.minibatch_group
        self.conv = EqualisedConv2d(widths[0] + 1, widths[0])
        self.linear = EqualisedLinear(widths[0] * 16, widths[0], activate=True)
        self.out = EqualisedLinear(widths[0], 1)

    def forward(self, x: Tensor, growth: Growth) -> Tensor:
        """Scores; at α < 1 what the new layers see is mixed with the image at half the resolution."""
        h = self.from_rgb[growth.level](x)
        for level in range(growth.level, 0, -1):
            h = F.avg_pool2d(self.blocks[level - 1](h), 2)
            if level == growth.level and growth.alpha < 1:
                h = torch.lerp(self.from_rgb[level - 1](F.avg_pool2d(x, 2)), h, growth.alpha)
        h = self.conv(minibatch_deviation(h, self.group))
        scores: Tensor = self.out(self.linear(h.flatten(1))).squeeze(1)
        return scores


def shrink(images: Tensor, growth: Growth) -> Tensor:
    """Real images at the resolution that has been reached; at α < 1 mixed with half of it, as G's images are."""
    factor = images.shape[-1] // (4 << growth.level)
    small = F.avg_pool2d(images, factor) if factor > 1 else images
    if growth.alpha < 1 and growth.level:
        small = torch.lerp(upsample(F.avg_pool2d(small, 2)), small, growth.alpha)
    return small


class ProGAN(LatentSystem):
    """Progressively growing GAN with WGAN-GP loss, equalised learning rate and pixelwise normalisation."""

    name: ClassVar[str] = "progan"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = (
        "T. Karras, T. Aila, S. Laine, J. Lehtinen: Progressive Growing of GANs for Improved Quality, Stability, and "
        "Variation, ICLR 2018, arXiv:1710.10196"
    )
    Config: ClassVar[type[SystemConfig]] = ProGANConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny16": {
            "resolution": 16, "channels": 1, "latent_dim": 32, "channel_base": 256, "channel_max": 32,
            "fade_kimg": 15.0, "stable_kimg": 15.0, "minibatch_group": 4,
        },
        "celebahq1024": {},
        # The authors' later configuration, which is faster.
        "celebahq1024-fast": {"fade_kimg": 600.0, "stable_kimg": 600.0, "minibatch_group": 4},
        "lsun256": {"resolution": 256},
        "cifar10": {
            "resolution": 32, "latent_dim": 128, "channel_base": 4096, "channel_max": 128, "fade_kimg": 400.0,
            "stable_kimg": 400.0, "target": 750.0,
        },
    }  # fmt: skip

    config: ProGANConfig

    def __init__(self, config: ProGANConfig) -> None:
        self.config = config
        self.generator, self.discriminator = ProGANGenerator(config), ProGANDiscriminator(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {name: OptimizerDefaults("adam", lr=self.config.lr, betas=(0.0, 0.99)) for name in self.networks()}

    def stages(self) -> Sequence[Stage]:
        c, both = self.config, tuple(self.networks())
        stages = [Stage("4 pixels", c.stable_kimg)]
        for level in range(1, c.levels):
            name = f"{4 << level} pixels"
            stages += [Stage(f"{name}, fading in", c.fade_kimg, both), Stage(name, c.stable_kimg, both)]
        return stages

    def growth(self, clock: Clock) -> Growth:
        """Every other stage fades a level in: α rises from 0 to 1 in a straight line."""
        stage, kimg = self.stage_of(clock)
        return Growth((stage + 1) // 2, kimg / self.config.fade_kimg if stage % 2 else 1.0)

    def updates(self, clock: Clock) -> Sequence[Update]:
        growth = self.growth(clock)
        D, G = partial(self.discriminator_loss, growth=growth), partial(self.generator_loss, growth=growth)
        return [
            Update("discriminator", "discriminator", D, second_order=True),
            Update("generator", "generator", G),
        ]

    def after_iteration(self, clock: Clock) -> None:
        """Remember how far G has grown, for sampling."""
        growth = self.growth(clock)
        self.generator.progress.copy_(torch.tensor([float(growth.level), growth.alpha]))

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            for layer in network.modules():
                if isinstance(layer, Initialised):
                    layer.init_weights(generator)
        self.generator.progress.copy_(torch.tensor([0.0, 1.0]))

    def discriminator_loss(self, batch: Batch, generator: Generator, growth: Growth) -> Loss:
        """E[D(x̃)] - E[D(x)] + λ/γ²·E[(‖∇D(x̂)‖₂ - γ)²] + ε·E[D(x)²] (appendix A.1, and 6.5 for γ)."""
        c, x = self.config, shrink(batch.images, growth)
        with torch.no_grad():
            fakes = self.generator(normal_latents((len(x), c.latent_dim), generator), growth).to(x.dtype)
        penalty = interpolated_penalty(lambda x: self.discriminator(x, growth), x, fakes, generator, c.target)
        # Two passes: each standard deviation over the minibatch must be of real or of generated images.
        real, fake = self.discriminator(x, growth), self.discriminator(fakes, growth)
        value = fake.mean() - real.mean() + c.penalty / c.target**2 * penalty + c.drift * real.square().mean()
        scalars = {"scores/real": real.mean(), "scores/fake": fake.mean(), "penalty/gradient": penalty}
        scalars["growth/resolution"] = torch.full_like(penalty, float(4 << growth.level))
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def generator_loss(self, batch: Batch, generator: Generator, growth: Growth) -> Loss:
        """-E[D(G(z))]."""
        z = normal_latents((len(batch.images), self.config.latent_dim), generator)
        return Loss(-self.discriminator(self.generator(z, growth), growth).mean())

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Images at the resolution that has been reached, enlarged pixel by pixel to the final one."""
        growth = Growth(self.config.levels - 1, 1.0)
        if has_values(self.generator.progress):
            level, alpha = self.generator.progress.tolist()
            growth = Growth(int(level), alpha)
        images: Tensor = self.generator(latents["latents"], growth).float()
        for _ in range(growth.level, self.config.levels - 1):
            images = upsample(images)
        return images.clamp(-1, 1)
