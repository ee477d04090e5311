"""BiGAN (Donahue, Krähenbühl and Darrell 2017, arXiv:1605.09782): a GAN that learns the way back, too.

The networks are those of section 4.1 for MNIST: layers without structure in generator, encoder and discriminator. What
the text leaves open is as in the authors' code: there are no biases, and batch normalisation has no parameters; both
hidden layers of the generator are normalised, and the second ones of encoder and discriminator; the discriminator sees
z in its second layer. Images lie in [-1, 1] and end with a tanh, in that code in [0, 1] and with a sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Linear
from bessemer.nn.init import init_weights
from bessemer.nn.norm import BatchNorm
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update

__all__ = ["BiGAN", "BiGANConfig", "BiGANDiscriminator"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BiGANConfig(SystemConfig):
    """Configuration of BiGAN; the defaults are those of MNIST."""

    resolution: Count = 28
    """Height and width of the images in pixels."""
    channels: Count = 1
    """Colour channels."""
    latent_dim: Count = 50
    """Dimension of z, each entry uniform in -1 to 1."""
    hidden: Count = 1024
    """Units of the two hidden layers of each network."""
    lr: Positive = 2e-4
    """Adam's learning rate in all networks."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.5e-5
    """L2 penalty, whose gradient joins that of the loss before Adam."""

    @property
    def pixels(self) -> int:
        """Values of an image."""
        return self.channels * self.resolution**2


def _linear(inputs: int, outputs: int) -> Linear:
    return Linear(inputs, outputs, bias=False)


class BiGANDiscriminator(nn.Module):
    """D(x, z): images [N, C, R, R] and latents [N, latent_dim] -> log odds that they are an image and its code, [N]."""

    def __init__(self, c: BiGANConfig) -> None:
        super().__init__()
        self.image, self.hidden = _linear(c.pixels, c.hidden), _linear(c.hidden, c.hidden)
        self.latent = _linear(c.latent_dim, c.hidden)
        self.norm, self.out = BatchNorm(c.hidden), _linear(c.hidden, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.hidden(F.leaky_relu(self.image(x.flatten(1)), 0.2)) + self.latent(z)
        scores: Tensor = self.out(F.leaky_relu(self.norm(h), 0.2)).squeeze(1)
        return scores


class BiGAN(System):
    """GAN whose discriminator judges pairs of image and latent, from the generator or from an encoder."""

    name: ClassVar[str] = "bigan"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = (
        "J. Donahue, P. Krähenbühl, T. Darrell: Adversarial Feature Learning, ICLR 2017, arXiv:1605.09782"
    )
    Config: ClassVar[type[SystemConfig]] = BiGANConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {"resolution": 8, "latent_dim": 16, "hidden": 128, "lr": 5e-4},
        "mnist": {},
    }

    config: BiGANConfig

    def __init__(self, config: BiGANConfig) -> None:
        self.config = c = config
        hidden, shape = c.hidden, (c.channels, c.resolution, c.resolution)
        self.generator = nn.Sequential(
            _linear(c.latent_dim, hidden), BatchNorm(hidden), nn.ReLU(),
            _linear(hidden, hidden), BatchNorm(hidden), nn.ReLU(),
            _linear(hidden, c.pixels), nn.Tanh(), nn.Unflatten(1, shape),
        )  # fmt: skip
        self.encoder = nn.Sequential(
            nn.Flatten(), _linear(c.pixels, hidden), nn.LeakyReLU(0.2),
            _linear(hidden, hidden), BatchNorm(hidden), nn.LeakyReLU(0.2),
            _linear(hidden, c.latent_dim),
        )  # fmt: skip
        self.discriminator = BiGANDiscriminator(c)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "encoder": self.encoder, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        rule = OptimizerDefaults("adam", lr=c.lr, betas=(0.5, 0.999), weight_decay=c.weight_decay)
        return dict.fromkeys(self.networks(), rule)

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        # The objective of G and E is a sum of one term for each, so each can have its own update.
        return [
            Update("discriminator", "discriminator", self.discriminator_loss),
            Update("generator", "generator", self.generator_loss),
            Update("encoder", "encoder", self.encoder_loss),
        ]

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            init_weights(network, generator, "normal")

    def _latents(self, n: int, generator: Generator) -> Tensor:
        """Draw z ~ U(-1, 1), [n, latent_dim]."""
        return 2 * torch.rand(n, self.config.latent_dim, generator=generator, device=generator.device) - 1

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[softplus(-D(x, E(x)))] + E[softplus(D(G(z), z))] (eq. 3)."""
        z = self._latents(len(batch.images), generator)
        with torch.no_grad():
            fakes, codes = self.generator(z), self.encoder(batch.images)
        real, fake = self.discriminator(batch.images, codes), self.discriminator(fakes, z)
        scalars = {"scores/real": real.mean().detach(), "scores/fake": fake.mean().detach()}
        return Loss(F.softplus(-real).mean() + F.softplus(fake).mean(), scalars)

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[softplus(-D(G(z), z))]: the labels turned round (section 3.4)."""
        z = self._latents(len(batch.images), generator)
        return Loss(F.softplus(-self.discriminator(self.generator(z), z)).mean())

    def encoder_loss(self, batch: Batch, generator: Generator) -> Loss:  # noqa: ARG002  # draws nothing
        """E[softplus(D(x, E(x)))], likewise."""
        codes = self.encoder(batch.images)
        error = (codes.detach().abs() - 1).clamp_min(0).mean()
        return Loss(F.softplus(self.discriminator(batch.images, codes)).mean(), {"codes/outside": error})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator", "encoder")

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Draw images; nothing is truncated."""
        images: Tensor = self.generator(self._latents(len(labels), generator))
        return images.float()

    @torch.no_grad()
    def reconstruct(self, batch: Batch, generator: Generator) -> Tensor:  # noqa: ARG002
        """G(E(x)), [N, C, R, R] in [-1, 1]."""
        images: Tensor = self.generator(self.encoder(batch.images))
        return images.float()
