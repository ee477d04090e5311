"""NVAE (Vahdat and Kautz 2020, arXiv:2007.03898): a deep hierarchical variational auto-encoder of convolutions.

Networks are in `nvae_networks.py` and `nvae_cells.py`; this file holds the objective, the sampler and the presets,
which are those of the paper's appendix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.binary import binarise
from bessemer.nn.init import init_weights
from bessemer.nn.likelihoods import Bernoulli, ImageDistribution, LogisticMixture, quantise
from bessemer.nn.norm import renew_statistics
from bessemer.nn.weight_penalty import largest_gains
from bessemer.systems.autoencoding.nvae_networks import Draw, NVAENetwork
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["NVAE", "NVAEConfig", "balance"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NVAEConfig(SystemConfig):
    """Configuration of NVAE."""

    resolution: Annotated[int, Field(ge=8)]
    """Height and width of the images in pixels; padded with black to a multiple of what the scales need."""
    channels: Literal[1, 3] = 3
    """Colour channels."""
    width: Count = 128
    """Channels of the first convolution; each block that halves the resolution doubles them."""
    groups: tuple[Count, ...] = (30,)
    """Groups of latent variables at each scale, from the largest feature maps to the smallest."""
    latent_channels: Count = 20
    """Channels of each group z_l."""
    encoder_cells: Count = 2
    """Cells per group of the bottom-up network."""
    decoder_cells: Count = 2
    """Cells per group of the top-down network."""
    process_blocks: Count = 1
    """Blocks that halve the resolution before the first scale, and that double it after the last."""
    process_cells: Count = 2
    """Cells in each of these blocks."""
    flows: Annotated[int, Field(ge=0)] = 1
    """Pairs of normalizing-flow cells in the posterior of each group."""
    se: bool = True
    """End every cell with squeeze and excitation."""
    output: Literal["mixture", "bernoulli"] = "mixture"
    """p(x | z): a discretised mixture of logistics, or black and white pixels. For the latter the images are binarised
    anew each time they are seen, with their grey values as probabilities."""
    components: Count = 10
    """Components of the mixture."""
    bits: Annotated[int, Field(ge=1, le=8)] = 8
    """Highest bits of each pixel that are modelled; the rest is cut off."""
    kl_warmup_kimg: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 6000.0
    """Images over which the weight β of the KL term rises from 1e-4 to 1; the paper takes 30% of the run."""
    kl_balancing: bool = True
    """Balance the groups' KL terms while β < 1."""
    spectral: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    """λ of the regularisation of weights and of batch normalisation gains."""
    spectral_start: Positive | None = None
    """λ at the beginning, where it falls to `spectral` while β rises; unset where it is the same all along."""
    power_iterations: Count = 4
    """Power iterations per update."""
    recompute: bool = False
    """Activation checkpointing: keep only the inputs of cells, and run these again in the backward pass."""
    standing_passes: Annotated[int, Field(ge=0)] = 500
    """Passes at the sampling temperature from which the statistics of batch normalisation are estimated anew before
    sampling; 0 keeps those of training."""
    standing_batch: Annotated[int, Field(ge=2)] = 8
    """Images in each of these passes."""
    lr: Positive = 1e-2
    """Adamax's learning rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3e-4
    """L2 penalty of the optimizer."""

    @property
    def padded_resolution(self) -> int:
        """Height and width inside the networks."""
        unit = 1 << (self.process_blocks + len(self.groups) - 1)
        return -(-self.resolution // unit) * unit

    @model_validator(mode="after")
    def _check(self) -> NVAEConfig:
        if not self.groups:
            raise ValueError("groups: name the groups of at least one scale")
        if self.padded_resolution >> (self.process_blocks + len(self.groups) - 1) < 2:
            raise ValueError(f"groups {list(self.groups)}: too many scales for resolution {self.resolution}")
        if (self.padded_resolution - self.resolution) % 2:
            raise ValueError(f"resolution: {self.resolution} is odd; use an even one")
        if self.output == "bernoulli" and self.bits != 8:
            raise ValueError("bits: output bernoulli has black and white pixels; leave bits at 8")
        if self.spectral_start is not None and self.spectral == 0:
            raise ValueError("spectral_start: λ falls in the logarithm, which never reaches spectral 0; set spectral")
        return self


def balance(kl: Tensor, sizes: Tensor) -> Tensor:
    """γ_l of each group, whose mean is 1 and through which no gradient flows (appendix A).

    γ_l is proportional to KL_l / size_l. Groups with little information so cost little, and are used instead of given
    up; without the division the many variables of large feature maps would outweigh the others. KL_l is the mean over
    the slice, so γ depends on the slice alone, not on the number of workers.

    Args:
        kl: [L, N] in nats.
        sizes: [L], proportional to the pixels of z_l over the groups at its scale.
    """
    wanted = (kl.detach().abs().mean(1) + 0.01) / sizes
    return wanted / wanted.mean()


_LARGE = {"width": 30, "groups": (16, 8, 4, 4, 4), "resolution": 256, "flows": 2, "bits": 5, "spectral_start": 1.0}


class NVAE(LikelihoodSystem):
    """Deep hierarchical VAE with residual cells, residual normal posteriors and spectral regularisation."""

    name: ClassVar[str] = "nvae"
    family: ClassVar[str] = "autoencoding"
    paper: ClassVar[str] = (
        "A. Vahdat, J. Kautz: NVAE: A Deep Hierarchical Variational Autoencoder, NeurIPS 2020, arXiv:2007.03898"
    )
    Config: ClassVar[type[SystemConfig]] = NVAEConfig
    data_fields: ClassVar[tuple[str, ...]] = ("channels", "classes")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny32": {
            "resolution": 32, "width": 16, "groups": (3, 2), "latent_channels": 8, "process_cells": 1,
            "encoder_cells": 1, "decoder_cells": 1, "flows": 0, "components": 5, "kl_warmup_kimg": 10.0,
            "standing_passes": 20, "standing_batch": 32,
        },
        "tiny28": {
            "resolution": 28, "channels": 1, "width": 8, "groups": (3, 2), "latent_channels": 8, "process_blocks": 2,
            "process_cells": 1, "encoder_cells": 1, "decoder_cells": 1, "flows": 0, "output": "bernoulli",
            "kl_warmup_kimg": 10.0, "standing_passes": 20, "standing_batch": 32,
        },
        "mnist": {
            "resolution": 28, "channels": 1, "width": 32, "groups": (10, 5), "process_blocks": 2, "process_cells": 3,
            "flows": 0, "output": "bernoulli", "kl_warmup_kimg": 7200.0,
        },
        "cifar10": {"resolution": 32},
        "imagenet32": {
            "resolution": 32, "width": 192, "groups": (28,), "spectral_start": 1.0, "kl_warmup_kimg": 17295.5,
        },
        "celeba64": {
            "resolution": 64, "width": 64, "groups": (20, 10, 5), "spectral": 0.1, "kl_warmup_kimg": 4394.8,
        },
        "celebahq256": {**_LARGE, "kl_warmup_kimg": 2430.0},
        "ffhq256": {**_LARGE, "spectral": 0.1, "kl_warmup_kimg": 3780.0, "lr": 8e-3},
    }  # fmt: skip

    config: NVAEConfig

    def __init__(self, config: NVAEConfig) -> None:
        self.config = c = config
        mixture = LogisticMixture.parameters_per_pixel(c.channels, c.components)
        self.vae = NVAENetwork(c, mixture if c.output == "mixture" else c.channels)
        # From the top downwards; the smallest is 1 (appendix A).
        sizes = [4.0**i / n for i, n in enumerate(reversed(c.groups)) for _ in range(n)]
        self._sizes = [size / min(sizes) for size in sizes]

    def networks(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        return {"vae": OptimizerDefaults("adamax", lr=c.lr, betas=(0.9, 0.999), eps=1e-3, weight_decay=c.weight_decay)}

    def kl_weight(self, clock: Clock) -> float:
        """β, from 1e-4 to 1 in a straight line (section 4)."""
        warmup = self.config.kl_warmup_kimg
        return min(max(clock.kimg / warmup, 1e-4), 1.0) if warmup else 1.0

    def spectral_weight(self, beta: float) -> float:
        """λ, which falls in a straight line of its logarithm where it falls at all."""
        c = self.config
        if c.spectral_start is None:
            return c.spectral
        return math.exp((1 - beta) * math.log(c.spectral_start) + beta * math.log(c.spectral))

    def updates(self, clock: Clock) -> Sequence[Update]:
        return [
            Update(
                "elbo", "vae", partial(self.loss, beta=self.kl_weight(clock)), whole_weights=self.config.spectral > 0
            )
        ]

    def init_weights(self, generator: Generator) -> None:
        init_weights(self.vae, generator, "uniform")
        nn.init.uniform_(self.vae.start.value, generator=generator)
        if self.vae.penalty is not None:
            self.vae.penalty.reset(generator)

    def _seen(self, images: Tensor, generator: Generator) -> Tensor:
        """The discrete images that are modelled."""
        if self.config.output == "mixture":
            return quantise(images, self.config.bits)
        return binarise(images, "random", generator)

    def _encoded(self, x: Tensor, generator: Generator) -> tuple[Tensor, list[Draw]]:
        """Parameters of p(x | z) for z from q(z | x), and what each group drew."""
        encoded: tuple[Tensor, list[Draw]] = self.vae(x, self.vae.draw_noise(len(x), generator))
        return encoded

    def _output(self, parameters: Tensor) -> ImageDistribution:
        """p(x | z)."""
        c = self.config
        if c.output == "bernoulli":
            return Bernoulli(parameters)
        return LogisticMixture(parameters, channels=c.channels, bits=c.bits)

    def loss(self, batch: Batch, generator: Generator, beta: float = 1.0) -> Loss:
        """E[-log p(x | z)] + β·Σ_l γ_l·KL_l + λ·(Σ σ(W) + Σ max|γ_BN|): nats per image (eq. 1, sections 3.2 and 4)."""
        c = self.config
        x = self._seen(batch.images, generator)
        parameters, draws = self._encoded(x, generator)
        reconstruction = -self._output(parameters).log_prob(x)
        kl = torch.stack([draw.kl for draw in draws])
        weighted = kl
        if c.kl_balancing and beta < 1:
            weighted = kl * balance(kl, kl.new_tensor(self._sizes))[:, None]
        value = (reconstruction + beta * weighted.sum(0)).mean()
        scalars = {
            "elbo/bits_per_dim": self._bits_per_dim(reconstruction + kl.sum(0)).mean(),
            "elbo/reconstruction": reconstruction.mean(),
            "elbo/kl": kl.sum(0).mean(),
            "elbo/active_groups": (kl.mean(1) > 0.1).sum().to(kl.dtype),
        }
        if self.vae.penalty is not None:
            penalty = self.spectral_weight(beta) * (self.vae.penalty() + largest_gains(self.vae))
            scalars["loss/spectral"] = penalty
            value = value + penalty
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def _bits_per_dim(self, nats: Tensor) -> Tensor:
        return nats / (math.log(2) * self.config.channels * self.config.resolution**2)

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("vae",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw images; `truncation` is the temperature t that σ of every prior is multiplied by (section 4.2).

        Mixtures are drawn from. Of black and white pixels the probabilities are shown, as in the paper.
        """
        p = self._of_noise(self.vae.draw_noise(len(labels), generator), truncation)
        return (p.sample(generator) if self.draws_pixels else p.mean()).float()

    def _of_noise(self, noise: Sequence[Tensor], truncation: float | None) -> ImageDistribution:
        """p(x | z) for z from the prior."""
        return self._output(self.vae.generate(noise, 1.0 if truncation is None else truncation))

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The noise of every group, from the top downwards: z_l = μ_l + t·σ_l·ε_l, its μ and σ functions of z_<l."""
        return {f"latents_{i}": shape for i, shape in enumerate(self.vae.noise_shapes, 1)}

    @property
    def draws_pixels(self) -> bool:
        return self.config.output == "mixture"

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002  # NVAE knows no classes
        """The mean of p(x | z): a draw would round, so that it could not be compared from one runtime to another."""
        return self._of_noise([latents[name] for name in self.latent_shapes], truncation).mean().float()

    def prepare_sampling(
        self,
        labels: Tensor,  # noqa: ARG002  # NVAE knows no classes
        generator: Generator,
        truncation: float | None = None,
    ) -> None:
        """Estimate the statistics of batch normalisation anew at the sampling temperature (section 4.2).

        The encoder's stay as they are, because sampling never runs it.
        """
        c = self.config
        if c.standing_passes:
            temperature = 1.0 if truncation is None else truncation

            def one_pass() -> None:
                self.vae.generate(self.vae.draw_noise(c.standing_batch, generator), temperature)

            renew_statistics(self.vae, one_pass, c.standing_passes)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, generator: Generator) -> Tensor:
        """Encode images and decode them again: the mean of p(x | z), [N, C, R, R] in [-1, 1]."""
        parameters, _ = self._encoded(self._seen(batch.images, generator), generator)
        return self._output(parameters).mean()

    @property
    def likelihood_protocol(self) -> str:
        if self.config.output == "bernoulli":
            return "binarised by drawing"
        return f"{self.config.bits} bits, not dequantised"

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:
        """Lower bound log (1/K) Σ_k p(x, z_k) / q(z_k | x) with z_k ~ q; the ELBO for K = 1."""
        x = self._seen(batch.images, generator)
        weights = [self._log_weight(x, *self._encoded(x, generator)) for _ in range(importance_samples)]
        return torch.logsumexp(torch.stack(weights), 0) - math.log(importance_samples)

    def _log_weight(self, x: Tensor, parameters: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Log p(x, z) / q(z | x), [N] float64."""
        ratios = torch.stack([draw.log_p.double() - draw.log_q.double() for draw in draws])
        return self._output(parameters).log_prob(x).double() + ratios.sum(0)
