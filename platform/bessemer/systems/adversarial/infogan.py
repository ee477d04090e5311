"""InfoGAN (Chen et al. 2016, arXiv:1606.03657): part of the latent vector is a code that can be read off the image.

The networks are those of table 1 in appendix C, for MNIST. Q gives each continuous code a variance of its own, as in
the paper; the authors' code holds it at 1. z is normal and images end with a tanh; in that code z is uniform in
[-1, 1], and images lie in [0, 1] and end with a sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import DoublingConv2d, HalvingConv2d, Linear
from bessemer.nn.init import init_weights
from bessemer.nn.latents import normal_latents
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.normal import Normal
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update

__all__ = ["InfoGAN", "InfoGANConfig", "InfoGANDiscriminator", "InfoGANGenerator"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class InfoGANConfig(SystemConfig):
    """Configuration of InfoGAN; the defaults are those of MNIST."""

    resolution: Count = 28
    """Height and width of the images in pixels; a multiple of 4."""
    channels: Count = 1
    """Colour channels."""
    noise_dim: Count = 62
    """Dimension of z, the part of the latent vector that is no code."""
    categories: Annotated[int, Field(ge=2)] = 10
    """Values of the categorical code."""
    continuous: Annotated[int, Field(ge=0)] = 2
    """Codes between -1 and 1."""
    width: Count = 64
    """Feature maps at half the resolution; twice as many at a quarter."""
    hidden: Count = 1024
    """Units of the fully connected layers."""
    q_hidden: Count = 128
    """Units of the layer between the discriminator's trunk and what it says of the code."""
    categorical_weight: Weight = 1.0
    """Weight of the information in the categorical code."""
    continuous_weight: Weight = 0.1
    """Weight of the information in the continuous codes."""
    generator_lr: Positive = 1e-3
    """Adam's learning rate of the generator."""
    discriminator_lr: Positive = 2e-4
    """Adam's learning rate of the discriminator."""

    @model_validator(mode="after")
    def _check(self) -> InfoGANConfig:
        if self.resolution % 4:
            raise ValueError(f"resolution: {self.resolution} is no multiple of 4, and two layers halve it")
        return self

    @property
    def latent_dim(self) -> int:
        """Of noise and codes together."""
        return self.noise_dim + self.categories + self.continuous


class InfoGANGenerator(nn.Module):
    """G(z, c): [N, latent_dim] -> images [N, C, R, R] in [-1, 1]."""

    def __init__(self, c: InfoGANConfig) -> None:
        super().__init__()
        side, f = c.resolution // 4, c.width
        self.layers = nn.Sequential(
            Linear(c.latent_dim, c.hidden), AffineBatchNorm(c.hidden), nn.ReLU(),
            Linear(c.hidden, side * side * 2 * f), AffineBatchNorm(side * side * 2 * f), nn.ReLU(),
            nn.Unflatten(1, (2 * f, side, side)),
            DoublingConv2d(2 * f, f), AffineBatchNorm(f), nn.ReLU(),
            DoublingConv2d(f, c.channels), nn.Tanh(),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.layers(latents)
        return images


class InfoGANDiscriminator(nn.Module):
    """D(x) and Q(c | x) on one trunk: images -> scores [N], log odds of the category, the normal of the other codes."""

    def __init__(self, c: InfoGANConfig) -> None:
        super().__init__()
        side, f, self.categories = c.resolution // 4, c.width, c.categories
        self.trunk = nn.Sequential(
            HalvingConv2d(c.channels, f), nn.LeakyReLU(0.1),
            HalvingConv2d(f, 2 * f), AffineBatchNorm(2 * f), nn.LeakyReLU(0.1),
            nn.Flatten(), Linear(side * side * 2 * f, c.hidden), AffineBatchNorm(c.hidden), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.score = Linear(c.hidden, 1)
        self.q = nn.Sequential(
            Linear(c.hidden, c.q_hidden), AffineBatchNorm(c.q_hidden), nn.LeakyReLU(0.1),
            Linear(c.q_hidden, c.categories + 2 * c.continuous),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Normal]:
        h = self.trunk(x)
        q = self.q(h).float()
        mu, log_sigma = q[:, self.categories :].chunk(2, 1)
        return self.score(h).squeeze(1), q[:, : self.categories], Normal(mu, log_sigma.clamp(-5, 5).exp())


class InfoGAN(System):
    """GAN that keeps the mutual information between a code and the image high, by a variational bound."""

    name: ClassVar[str] = "infogan"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = (
        "X. Chen, Y. Duan, R. Houthooft, J. Schulman, I. Sutskever, P. Abbeel: InfoGAN: Interpretable Representation "
        "Learning by Information Maximizing Generative Adversarial Nets, NIPS 2016, arXiv:1606.03657"
    )
    Config: ClassVar[type[SystemConfig]] = InfoGANConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny16": {"resolution": 16, "noise_dim": 30, "width": 16, "hidden": 128, "q_hidden": 64},
        "mnist": {},
    }

    config: InfoGANConfig

    def __init__(self, config: InfoGANConfig) -> None:
        self.config = config
        self.generator, self.discriminator = InfoGANGenerator(config), InfoGANDiscriminator(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        rates = {"generator": self.config.generator_lr, "discriminator": self.config.discriminator_lr}
        return {name: OptimizerDefaults("adam", lr=lr, betas=(0.5, 0.999)) for name, lr in rates.items()}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [
            Update("discriminator", "discriminator", self.discriminator_loss),
            Update("generator", "generator", self.generator_loss),
        ]

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            init_weights(network, generator, "normal", biases="zeros")

    def _draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [n, latent_dim], and of them the category [n] and the continuous codes [n, continuous]."""
        c, device = self.config, generator.device
        z = normal_latents((n, c.noise_dim), generator)
        category = torch.randint(c.categories, (n,), generator=generator, device=device)
        codes = 2 * torch.rand(n, c.continuous, generator=generator, device=device) - 1
        return torch.cat([z, F.one_hot(category, c.categories).to(z.dtype), codes], 1), category, codes

    def information(self, logits: Tensor, q: Normal, category: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """L_I = E[log Q(c | x)] + H(c) ≤ I(c; G(z, c)) (eq. 5), of the category and of the other codes: nats."""
        c = self.config
        categorical = math.log(c.categories) - F.cross_entropy(logits, category)
        continuous = q.log_prob(codes).sum(1).mean() + c.continuous * math.log(2)
        return categorical, continuous

    def _weighted(self, information: tuple[Tensor, Tensor]) -> Tensor:
        return self.config.categorical_weight * information[0] + self.config.continuous_weight * information[1]

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[softplus(-D(x))] + E[softplus(D(G(z, c)))] - λ·L_I (eq. 6), over the weights of D and Q."""
        latents, *drawn = self._draw(len(batch.images), generator)
        with torch.no_grad():
            fakes = self.generator(latents)
        # Two passes: each batch normalisation must be over real or over generated images.
        fake, logits, q = self.discriminator(fakes)
        real, _, _ = self.discriminator(batch.images)
        found = self.information(logits, q, *drawn)
        value = F.softplus(-real).mean() + F.softplus(fake).mean() - self._weighted(found)
        scalars = {"scores/real": real.mean(), "scores/fake": fake.mean()}
        scalars |= {"information/category": found[0], "information/continuous": found[1]}
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[softplus(-D(G(z, c)))] - λ·L_I, over the weights of G."""
        latents, *drawn = self._draw(len(batch.images), generator)
        fake, logits, q = self.discriminator(self.generator(latents))
        return Loss(F.softplus(-fake).mean() - self._weighted(self.information(logits, q, *drawn)))

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Draw noise and codes; classes of the data are not known, and nothing is truncated."""
        images: Tensor = self.generator(self._draw(len(labels), generator)[0])
        return images.float()
