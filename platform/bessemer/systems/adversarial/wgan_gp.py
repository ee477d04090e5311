"""WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028): a Wasserstein GAN whose critic is kept Lipschitz by a penalty.

The residual networks are those of appendix F, for CIFAR-10. A block upsamples before its first convolution, as in the
authors' code. That code also draws twice as many images for an update of the generator as for one of the critic, and
adds noise of less than a step of the 8 bits to real images; neither is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Conv2d, Linear
from bessemer.nn.init import init_weights, scale_branches
from bessemer.nn.latents import normal_latents
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.penalties import interpolated_penalty
from bessemer.nn.resample import upsample
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.latent import LatentSystem

__all__ = ["WGANGP", "WGANGPConfig", "WGANGPCritic", "WGANGPGenerator"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class WGANGPConfig(SystemConfig):
    """Configuration of WGAN-GP."""

    resolution: Literal[16, 32, 64] = 32
    """Height and width of the images in pixels."""
    channels: Count = 3
    """Colour channels."""
    latent_dim: Count = 128
    """Dimension of z."""
    generator_width: Count = 128
    """Channels of all layers of the generator."""
    critic_width: Count = 128
    """Channels of all layers of the critic."""
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """λ, weight of the gradient penalty."""
    critic_steps: Count = 5
    """n_critic, updates of the critic per update of the generator."""
    lr: Positive = 2e-4
    """Adam's learning rate in both networks; algorithm 1 has 1e-4, the residual networks 2e-4 with linear decay."""
    betas: tuple[float, float] = (0.0, 0.9)
    """Adam's decay rates in both networks."""


class _Block(nn.Module):
    """Residual block, with batch normalisation in the generator and without any in the critic."""

    def __init__(self, width: int, *, resample: Literal["up", "down"] | None = None, norm: bool = False) -> None:
        super().__init__()
        self.resample = resample
        self.norm1, self.norm2 = (AffineBatchNorm(width) if norm else nn.Identity() for _ in range(2))
        self.conv1, self.conv2 = Conv2d(width, width), Conv2d(width, width)
        self.shortcut = Conv2d(width, width, 1) if resample else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        h = self.conv1(upsample(h) if self.resample == "up" else h)
        h = self.conv2(F.relu(self.norm2(h)))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        x = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = h + (upsample(x) if self.resample == "up" else x)
        return out


class _FirstBlock(nn.Module):
    """The critic's first block, which sees images and halves the resolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv2d(channels, width), Conv2d(width, width)
        self.shortcut = Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        out: Tensor = F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))
        return out


class WGANGPGenerator(nn.Module):
    """G(z): [N, latent_dim] -> images [N, channels, R, R] in [-1, 1]; blocks double the resolution from 4×4 on."""

    def __init__(self, c: WGANGPConfig) -> None:
        super().__init__()
        width, blocks = c.generator_width, c.resolution.bit_length() - 3
        self.linear = Linear(c.latent_dim, width * 4 * 4)
        self.blocks = nn.Sequential(*[_Block(width, resample="up", norm=True) for _ in range(blocks)])
        self.norm = AffineBatchNorm(width)
        self.conv = Conv2d(width, c.channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.blocks(self.linear(z).view(z.shape[0], -1, 4, 4))
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class WGANGPCritic(nn.Module):
    """D(x): images -> scores [N] without bounds. Blocks halve the resolution to 8×8, two follow, then the mean."""

    def __init__(self, c: WGANGPConfig) -> None:
        super().__init__()
        width, halved = c.critic_width, c.resolution.bit_length() - 5
        self.first = _FirstBlock(c.channels, width)
        self.blocks = nn.Sequential(
            *[_Block(width, resample="down") for _ in range(halved)], *[_Block(width) for _ in range(2)]
        )
        self.linear = Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.blocks(self.first(x))).mean((2, 3))
        scores: Tensor = self.linear(h).squeeze(1)
        return scores


class WGANGP(LatentSystem):
    """Wasserstein GAN with a penalty on the norm of the critic's gradient."""

    name: ClassVar[str] = "wgan-gp"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = (
        "I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville: Improved Training of Wasserstein GANs, "
        "NIPS 2017, arXiv:1704.00028"
    )
    Config: ClassVar[type[SystemConfig]] = WGANGPConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny16": {
            "resolution": 16, "channels": 1, "generator_width": 32, "critic_width": 32, "latent_dim": 32,
            "critic_steps": 3, "lr": 4e-4,
        },
        "cifar10": {},
    }  # fmt: skip

    config: WGANGPConfig

    def __init__(self, config: WGANGPConfig) -> None:
        self.config = config
        self.generator, self.critic = WGANGPGenerator(config), WGANGPCritic(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {name: OptimizerDefaults("adam", lr=self.config.lr, betas=self.config.betas) for name in self.networks()}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [
            Update("critic", "critic", self.critic_loss, repeats=self.config.critic_steps, second_order=True),
            Update("generator", "generator", self.generator_loss),
        ]

    def init_weights(self, generator: Generator) -> None:
        """Xavier, times He's √2 in the residual blocks' branches, and biases of 0, as in the authors' code."""
        for network in self.networks().values():
            init_weights(network, generator, "xavier", biases="zeros")
            scale_branches(m for m in network.modules() if isinstance(m, (_FirstBlock, _Block)))

    def critic_loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[D(x̃)] - E[D(x)] + λ·E[(‖∇D(x̂)‖₂ - 1)²] (eq. 3), x̂ between x and x̃, another point for each pair."""
        x = batch.images
        with torch.no_grad():
            fakes = self.generator(normal_latents((len(x), self.config.latent_dim), generator)).to(x.dtype)
        penalty = interpolated_penalty(self.critic, x, fakes, generator)
        real, fake = self.critic(x).mean(), self.critic(fakes).mean()
        value = fake - real + self.config.penalty * penalty
        scalars = {"scores/real": real, "scores/fake": fake, "wasserstein": real - fake, "penalty/gradient": penalty}
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """-E[D(G(z))]."""
        z = normal_latents((len(batch.images), self.config.latent_dim), generator)
        return Loss(-self.critic(self.generator(z)).mean())

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        images: Tensor = self.generator(latents["latents"])
        return images.float()
