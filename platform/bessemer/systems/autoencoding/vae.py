"""Variational auto-encoder (Kingma and Welling 2014, arXiv:1312.6114) and β-VAE (Higgins et al., ICLR 2017).

The MLPs are those of appendix C of the first paper. The convolutions are those of table 1 in the appendix of the
second, for faces (CelebA); for dSprites they are the same, with latents, β and learning rate of Locatello et al. 2019
(arXiv:1811.12359), whose own encoder ends in kernels of 2×2; and with a capacity those of Burgess et al. 2018
(arXiv:1804.03599, appendix). The first papers use Adagrad in places; here it is Adam, as in all later ones. Initial
weights are ours. A β belongs to the width of p(x | z), which these papers leave open where it is normal: here it is
learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.binary import Binarisation, binarise
from bessemer.nn.convolutions import DoublingConv2d, HalvingConv2d, Linear
from bessemer.nn.dequantise import dequantise, log_volume
from bessemer.nn.init import init_weights
from bessemer.nn.likelihoods import Bernoulli
from bessemer.nn.normal import Normal
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.latent import LatentSystem
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["VAE", "VAEConfig", "VAENetwork"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class VAEConfig(SystemConfig):
    """Configuration of the VAE."""

    resolution: Count
    """Height and width of the images in pixels."""
    channels: Count = 1
    """Colour channels."""
    network: Literal["mlp", "conv"] = "mlp"
    """Layers without structure, or 4x4 convolutions that halve the resolution four times."""
    widths: tuple[Count, Count, Count, Count] = (32, 32, 64, 64)
    """Channels of the encoder's convolutions; the decoder's are the same backwards."""
    hidden: Count = 500
    """Units of each hidden layer; with convolutions, of those between them and the latents."""
    layers: Annotated[int, Field(ge=0)] = 1
    """Hidden layers of encoder and decoder; an MLP of 0 is linear."""
    latent_dim: Count = 20
    """Dimension of z."""
    output: Literal["bernoulli", "normal"] = "bernoulli"
    """p(x | z): black and white pixels, or a normal distribution of dequantised ones of one width, which is learned."""
    binarise: Binarisation = "random"
    """How grey pixels become black and white."""
    beta: Weight = 1.0
    """β, weight of the KL term; 1 makes the loss the negative ELBO."""
    capacity: Weight | None = None
    """C in nats: the KL term becomes `beta` times its distance from C (Burgess et al. 2018, arXiv:1804.03599)."""
    capacity_kimg: Positive = 6400.0
    """Images, in thousands, over which C rises from 0."""
    lr: Positive = 1e-3
    """Adam's learning rate."""

    @model_validator(mode="after")
    def _check(self) -> VAEConfig:
        if self.network == "conv" and self.resolution % 16:
            raise ValueError(f"resolution: {self.resolution} is no multiple of 16, which network conv needs")
        return self


def _mlp(c: VAEConfig, inputs: int, outputs: int) -> nn.Sequential:
    sizes = [inputs, *[c.hidden] * c.layers]
    hidden = [m for a, b in pairwise(sizes) for m in (Linear(a, b), nn.Tanh())]
    return nn.Sequential(*hidden, Linear(sizes[-1], outputs))


class VAENetwork(nn.Module):
    """Encoder q(z | x) and decoder p(x | z)."""

    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        self.shape = (c.channels, c.resolution, c.resolution)
        pixels, small = math.prod(self.shape), c.resolution // 16
        if c.network == "mlp":
            self.encoder = nn.Sequential(nn.Flatten(), *_mlp(c, pixels, 2 * c.latent_dim))
            self.decoder = nn.Sequential(*_mlp(c, c.latent_dim, pixels), nn.Unflatten(1, self.shape))
        else:
            maps = [c.channels, *c.widths]
            dense = [maps[-1] * small**2, *[c.hidden] * c.layers]
            self.encoder = nn.Sequential(
                *[m for i, o in pairwise(maps) for m in (HalvingConv2d(i, o), nn.ReLU())], nn.Flatten(),
                *[m for i, o in pairwise(dense) for m in (Linear(i, o), nn.ReLU())],
                Linear(dense[-1], 2 * c.latent_dim),
            )  # fmt: skip
            back, up = [c.latent_dim, *reversed(dense)], [DoublingConv2d(i, o) for i, o in pairwise(reversed(maps))]
            self.decoder = nn.Sequential(
                *[m for i, o in pairwise(back) for m in (Linear(i, o), nn.ReLU())],
                nn.Unflatten(1, (maps[-1], small, small)), *[m for layer in up for m in (layer, nn.ReLU())][:-1],
            )  # fmt: skip
        if c.output == "normal":
            self.log_sigma = nn.Parameter(torch.zeros(1))

    def posterior(self, x: Tensor) -> Normal:
        """q(z | x) = N(μ, σ²): x [N, C, H, W] in [-1, 1] -> [N, latent_dim]."""
        mu, log_sigma = self.encoder(x).float().chunk(2, 1)
        return Normal(mu, log_sigma.exp())

    def forward(self, z: Tensor) -> Tensor:
        """Log odds of white, or means: [N, latent_dim] -> [N, C, H, W]."""
        out: Tensor = self.decoder(z)
        return out.float()


class VAE(LatentSystem, LikelihoodSystem):
    """Variational auto-encoder, also as β-VAE and with a controlled capacity; images are the mean of p(x | z)."""

    name: ClassVar[str] = "vae"
    family: ClassVar[str] = "autoencoding"
    paper: ClassVar[str] = (
        "D. P. Kingma, M. Welling: Auto-Encoding Variational Bayes, ICLR 2014, arXiv:1312.6114; with I. Higgins et "
        "al.: beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, ICLR 2017"
    )
    Config: ClassVar[type[SystemConfig]] = VAEConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {"resolution": 8, "hidden": 128, "latent_dim": 8},
        "mnist": {"resolution": 28},
        "beta-celeba64": {
            "resolution": 64, "channels": 3, "network": "conv", "hidden": 256, "latent_dim": 32, "output": "normal",
            "beta": 250.0, "lr": 1e-4,
        },
        "beta-dsprites64": {
            "resolution": 64, "network": "conv", "hidden": 256, "latent_dim": 10, "binarise": "threshold", "beta": 4.0,
            "lr": 1e-4,
        },
        "capacity-dsprites64": {
            "resolution": 64, "network": "conv", "hidden": 256, "latent_dim": 10, "binarise": "threshold",
            "widths": (32, 32, 32, 32), "layers": 2, "beta": 1000.0, "capacity": 25.0, "lr": 5e-4,
        },
    }  # fmt: skip

    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        self.config = config
        self.vae = VAENetwork(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"vae": OptimizerDefaults("adam", lr=self.config.lr, betas=(0.9, 0.999))}

    def updates(self, clock: Clock) -> Sequence[Update]:
        return [Update("elbo", "vae", partial(self.loss, capacity=self.capacity(clock)))]

    def capacity(self, clock: Clock) -> float | None:
        """C at a moment, in nats."""
        c = self.config
        return None if c.capacity is None else c.capacity * min(1.0, clock.kimg / c.capacity_kimg)

    def init_weights(self, generator: Generator) -> None:
        init_weights(self.vae, generator, "xavier")
        if self.config.output == "normal":
            nn.init.zeros_(self.vae.log_sigma)

    def _seen(self, images: Tensor, generator: Generator) -> Tensor:
        """What is modelled: black and white, or dequantised images."""
        if self.config.output == "bernoulli":
            return binarise(images, self.config.binarise, generator)
        return dequantise(images, 8, generator)

    def _log_p_x(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Log p(x | z), [N]; of the pixels' levels, not of their density."""
        if self.config.output == "bernoulli":
            return Bernoulli(parameters).log_prob(x)
        density = Normal(parameters, self.vae.log_sigma.exp().view(1, 1, 1, 1)).log_prob(x)
        return density.sum((1, 2, 3)) + log_volume(x[0].numel(), 8)

    def loss(self, batch: Batch, generator: Generator, capacity: float | None = None) -> Loss:
        """-E[log p(x | z)] + β·KL(q(z | x) ‖ p(z)) (eq. 10), nats per image; with a capacity γ·|KL - C| instead."""
        x = self._seen(batch.images, generator)
        q = self.vae.posterior(x)
        reconstruction = -self._log_p_x(x, self.vae(q.sample(generator))).mean()
        kl = q.kl(Normal(torch.zeros_like(q.mu), torch.ones_like(q.sigma))).sum(1).mean()
        value = reconstruction + self.config.beta * (kl if capacity is None else (kl - capacity).abs())
        bits = (reconstruction + kl) / (math.log(2) * x[0].numel())
        scalars = {"elbo/bits_per_dim": bits, "elbo/reconstruction": reconstruction, "elbo/kl": kl}
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("vae",)

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """The mean of p(x | z)."""
        parameters = self.vae(latents["latents"])
        return Bernoulli(parameters).mean() if self.config.output == "bernoulli" else parameters.clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, generator: Generator) -> Tensor:
        """Encode images and decode them again: the mean of p(x | z), [N, C, R, R] in [-1, 1]."""
        z = self.vae.posterior(self._seen(batch.images, generator)).sample(generator)
        return self.generate({"latents": z}, batch.labels)

    @property
    def likelihood_protocol(self) -> str:
        if self.config.output == "normal":
            return "8 bits, dequantised"
        return "binarised by drawing" if self.config.binarise == "random" else "binarised at the middle"

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:
        """Lower bound log (1/K) Σ_k p(x, z_k)/q(z_k | x); the ELBO for K = 1."""
        return self.bound(self._seen(batch.images, generator), generator, importance_samples)

    def bound(self, x: Tensor, generator: Generator, importance_samples: int) -> Tensor:
        """That bound for what is modelled, [N] float64."""
        q, weights = self.vae.posterior(x), []
        prior = Normal(torch.zeros_like(q.mu), torch.ones_like(q.sigma))
        for _ in range(importance_samples):
            z = q.sample(generator)
            log_ratio = (prior.log_prob(z) - q.log_prob(z)).double().sum(1)
            weights.append(self._log_p_x(x, self.vae(z)).double() + log_ratio)
        return torch.logsumexp(torch.stack(weights), 0) - math.log(importance_samples)
