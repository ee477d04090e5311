"""BigGAN (Brock, Donahue and Simonyan 2019, arXiv:1809.11096), section 3 and appendices B to D.

Where the paper is silent the networks and presets follow BigGAN-PyTorch and its launch scripts; parameter counts are
those of that code and of Google's compare_gan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.init import WeightInit, init_weights
from bessemer.nn.latents import normal_latents
from bessemer.nn.norm import renew_statistics
from bessemer.nn.regularise import modified_orthogonal
from bessemer.systems.adversarial.biggan_networks import G_WIDTHS, BigGANDiscriminator, BigGANGenerator
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update

__all__ = ["BigGAN", "BigGANConfig", "CommonConfig"]

Width = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CommonConfig(SystemConfig):
    """What BigGAN and BigGAN-deep share; the defaults are those of the ImageNet launch scripts."""

    resolution: Literal[32, 64, 128, 256, 512]
    """Height and width of the images in pixels."""
    channels: Annotated[int, Field(ge=1)] = 3
    """Colour channels."""
    classes: Annotated[int, Field(ge=1)] = 1
    """Classes; 1 for data without labels, which then share one learned class vector."""
    conditional: bool = True
    """Give the class to both networks; if not, labels are ignored, and neither has a table of classes."""
    generator_width: Width = 96
    """ch of the generator: its narrowest layer."""
    discriminator_width: Width = 96
    """ch of the discriminator."""
    latent_dim: Annotated[int, Field(ge=1)] = 120
    """Dimension of z."""
    shared_dim: Annotated[int, Field(ge=0)] = 128
    """Dimension of the class embedding that all normalisation layers share."""
    generator_attention: tuple[int, ...] = (64,)
    """Resolutions at which self-attention follows a block of the generator."""
    discriminator_attention: tuple[int, ...] = (64,)
    """Resolutions at which self-attention follows a block of the discriminator."""
    init: WeightInit = "orthogonal"
    """Distribution of the initial weights."""
    sn_eps: Positive = 1e-6
    """Smallest norm in the power iteration of spectral normalisation."""
    bn_eps: Positive = 1e-5
    """Added to the variance in batch normalisation."""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of an update's batch statistics in the new running statistics."""
    d_steps: Annotated[int, Field(ge=1)] = 1
    """Discriminator updates per generator update."""
    generator_images: Annotated[int, Field(ge=1)] = 1
    """Images in a slice of the generator's update, over the real ones in a slice."""
    orthogonal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """β of the modified orthogonal regularisation of the generator; the paper uses 1e-4, the launch scripts 0."""
    generator_lr: Positive = 1e-4
    """Adam's learning rate of the generator."""
    discriminator_lr: Positive = 4e-4
    """Adam's learning rate of the discriminator."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Adam's decay rates in both networks."""
    adam_eps: Positive = 1e-6
    """Adam's ε in both networks."""
    r1_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight (gamma) of the R1 penalty on the discriminator (Mescheder et al. 2018, eq. 9); 0, as here, for none."""
    r1_interval: Annotated[int, Field(ge=1)] = 16
    """Iterations between two R1 updates; the penalty is multiplied by it (lazy regularisation)."""
    truncation_by: Literal["resampling", "scaling"] = "resampling"
    """What truncation t does to z: entries beyond ±t are drawn again (section 3.1), or all are multiplied by t, as in
    BigGAN-PyTorch."""
    standing_passes: Annotated[int, Field(ge=0)] = 16
    """Forward passes over which the standing statistics for sampling are averaged; 0 keeps the running statistics."""
    standing_batch: Annotated[int, Field(ge=2)] = 64
    """Images in each of these passes."""

    @model_validator(mode="after")
    def _check_attention(self) -> CommonConfig:
        legal = [2**i for i in range(3, self.resolution.bit_length())]
        for field in ("generator_attention", "discriminator_attention"):
            if wrong := sorted(set(getattr(self, field)) - set(legal)):
                raise ValueError(f"{field} {wrong}: blocks end at resolutions {legal}")
        return self


class BigGANConfig(CommonConfig):
    """Configuration of BigGAN."""

    hierarchical: bool = True
    """Cut z into equal chunks: the first feeds the linear layer, the others one block each. Then latent_dim is a
    multiple of the number of blocks plus one."""
    generator_spectral: bool = True
    """Spectral normalisation in the generator too (SAGAN), not in the discriminator alone (SNGAN)."""
    thin_discriminator: bool = False
    """Change the number of channels in a block's second convolution instead of its first (SNGAN)."""
    attention_once: bool = False
    """At resolution 32, attention at 16 in the discriminator follows its first block alone, whose output is 16x16, and
    not all four, as in BigGAN-PyTorch."""
    shortcut: Literal["resampled", "widened"] = "resampled"
    """Discriminator blocks with a 1x1 convolution on the shortcut: all that downsample or change the number of
    channels (BigGAN-PyTorch), or only those that change it (compare_gan)."""

    @model_validator(mode="after")
    def _check_latent(self) -> BigGANConfig:
        chunks = len(G_WIDTHS[self.resolution])
        if self.hierarchical and self.conditional and self.shared_dim == 0:
            raise ValueError("hierarchical needs shared_dim > 0: chunks of z join the shared class embedding")
        if self.hierarchical and self.latent_dim % chunks:
            raise ValueError(
                f"latent_dim {self.latent_dim} must be a multiple of {chunks} at resolution {self.resolution}: one "
                f"chunk for the linear layer and for each of {chunks - 1} blocks; or set hierarchical to false"
            )
        return self


_CIFAR = {
    "resolution": 32, "generator_width": 64, "discriminator_width": 64, "latent_dim": 128, "shared_dim": 0,
    "hierarchical": False, "generator_attention": (), "discriminator_attention": (), "init": "normal",
    "sn_eps": 1e-8, "d_steps": 4, "generator_lr": 2e-4, "discriminator_lr": 2e-4, "adam_eps": 1e-8,
}  # fmt: skip
# Learning rates and steps of D are the launch scripts' (rates of SAGAN, for batches of 256). Those of the paper, for
# 2048, are in the job files: 5e-5 in G and 2e-4 in D, two steps of D (appendix C).
_IMAGENET = {"classes": 1000}


class BigGAN(System):
    """Class-conditional GAN with hinge loss, spectral norm in both networks and truncated sampling."""

    name: ClassVar[str] = "biggan"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = (
        "A. Brock, J. Donahue, K. Simonyan: Large Scale GAN Training for High Fidelity Natural Image Synthesis, "
        "ICLR 2019, arXiv:1809.11096"
    )
    Config: ClassVar[type[SystemConfig]] = BigGANConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny32": {
            **_CIFAR, "classes": 10, "generator_width": 16, "discriminator_width": 16, "latent_dim": 80,
            "shared_dim": 32, "hierarchical": True, "generator_attention": (16,), "discriminator_attention": (16,),
            "init": "orthogonal", "d_steps": 1, "orthogonal": 1e-4, "standing_batch": 32,
        },
        "cifar10": {**_CIFAR, "classes": 10},
        "cifar100": {**_CIFAR, "classes": 100},
        "res32": {**_CIFAR, "classes": 10, "shared_dim": 128, "hierarchical": True},
        "imagenet64": {
            **_IMAGENET, "resolution": 64, "generator_width": 64, "discriminator_width": 64,
            "generator_attention": (32,), "discriminator_attention": (32,),
        },
        "imagenet128": {**_IMAGENET, "resolution": 128},
        "imagenet128-ch64": {**_IMAGENET, "resolution": 128, "generator_width": 64, "discriminator_width": 64},
        "imagenet256": {**_IMAGENET, "resolution": 256, "latent_dim": 140},
        # The released TensorFlow Hub generators: attention at 128 in G, compare_gan's shortcut rule in D.
        "imagenet256-tfhub": {
            **_IMAGENET, "resolution": 256, "latent_dim": 140, "generator_attention": (128,), "shortcut": "widened",
            "sn_eps": 1e-4, "bn_eps": 1e-4,
        },
        "imagenet512": {**_IMAGENET, "resolution": 512, "latent_dim": 160, "shortcut": "widened"},
        "imagenet512-tfhub": {
            **_IMAGENET, "resolution": 512, "latent_dim": 128, "shortcut": "widened", "sn_eps": 1e-4, "bn_eps": 1e-4,
        },
    }  # fmt: skip

    config: CommonConfig

    def __init__(self, config: Any) -> None:
        self.config = config
        self.generator, self.discriminator = self._build(config)

    def _build(self, config: Any) -> tuple[nn.Module, nn.Module]:
        return BigGANGenerator(config), BigGANDiscriminator(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        rates = {"generator": c.generator_lr, "discriminator": c.discriminator_lr}
        return {k: OptimizerDefaults("adam", lr=lr, betas=c.betas, eps=c.adam_eps) for k, lr in rates.items()}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        c = self.config
        r1 = Update("r1", "discriminator", self.r1_loss, interval=c.r1_interval, lazy=True, second_order=True)
        return [
            Update("discriminator", "discriminator", self.discriminator_loss, repeats=c.d_steps),
            *([r1] if c.r1_gamma else []),
            Update("generator", "generator", self.generator_loss),
        ]

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            init_weights(network, generator, self.config.init)

    def _draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw z [n, latent_dim] and uniformly distributed classes [n]."""
        z = normal_latents((n, self.config.latent_dim), generator)
        return z, torch.randint(self.config.classes, (n,), generator=generator, device=generator.device)

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Hinge loss E[relu(1 - D(x, y))] + E[relu(1 + D(G(z, y'), y'))]."""
        z, labels = self._draw(len(batch.images), generator)
        with torch.no_grad():
            fakes = self.generator(z, labels)
        # One pass over both: D normalises nothing over the batch, so this equals two passes.
        scores = self.discriminator(torch.cat([fakes, batch.images]), torch.cat([labels, batch.labels]))
        fake, real = scores.chunk(2)
        value = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        scalars = {"scores/real": real.mean(), "scores/fake": fake.mean()}
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def r1_loss(self, batch: Batch, generator: Generator) -> Loss:  # noqa: ARG002  # draws nothing
        """R1 penalty, interval · γ/2 · E[|∇D(x, y)|²] over real images (Mescheder, Geiger and Nowozin 2018, eq. 9)."""
        images = batch.images.detach().requires_grad_()
        scores = self.discriminator(images, batch.labels)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        penalty = gradient.square().sum((1, 2, 3)).mean()
        # The zero term lets parameters that the gradient does not depend on take part, as all workers must.
        value = self.config.r1_interval * self.config.r1_gamma / 2 * penalty + 0 * scores.mean()
        return Loss(value, {"penalty/r1": penalty.detach()})

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """-E[D(G(z, y), y)], plus β times the modified orthogonal penalty on all weights but the shared embedding."""
        z, labels = self._draw(len(batch.images) * self.config.generator_images, generator)
        value = -self.discriminator(self.generator(z, labels), labels).mean()
        scalars: dict[str, Tensor] = {}
        if self.config.orthogonal:
            shared = [m for m in [self.generator.shared] if isinstance(m, nn.Module)]
            penalty = self.config.orthogonal * modified_orthogonal(self.generator, exclude=shared)
            scalars["loss/orthogonal"] = penalty.detach()
            value = value + penalty
        return Loss(value, scalars)

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw images; `truncation` t redraws the entries of z beyond ±t, or scales z by t (`truncation_by`)."""
        shape, t = (len(labels), self.config.latent_dim), truncation
        if t is not None and self.config.truncation_by == "scaling":
            z = t * normal_latents(shape, generator)
        else:
            z = normal_latents(shape, generator, t)
        return self.generate({"latents": z}, labels)

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"latents": (self.config.latent_dim,)}

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002  # z is all that is truncated
        images: Tensor = self.generator(latents["latents"], labels)
        return images.float()

    def prepare_sampling(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> None:
        """Standing statistics: batch statistics averaged over `standing_passes` passes at the sampling truncation."""
        if not self.config.standing_passes:
            return

        def one_pass() -> None:
            shape = (self.config.standing_batch,)
            some = torch.randint(len(labels), shape, generator=generator, device=generator.device)
            self.sample(labels[some], generator, truncation)

        renew_statistics(self.generator, one_pass, self.config.standing_passes)
