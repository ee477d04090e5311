"""DVD-GAN (Clark, Donahue and Simonyan 2019, arXiv:1907.06571): BigGAN for clips, with two discriminators.

A recurrent unit at each resolution of the generator makes the frames, residual blocks draw each of them. D_S judges k
whole frames one by one, D_T a clip of half the resolution: together they see everything and cost little.

The widths of the layers (`generator_width`, `discriminator_width` and their multiples) are ours, after BigGAN's: they
have not been compared with the paper's, and neither have the sizes of the networks. That D_T halves the number of
frames in each of its two 3-D blocks is our reading, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.init import init_weights
from bessemer.nn.latents import normal_latents
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.latent import LatentSystem
from bessemer.systems.video.dvdgan_networks import DVDGANDiscriminator, DVDGANGenerator

__all__ = ["DVDGAN", "DVDGANConfig"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DVDGANConfig(SystemConfig):
    """Configuration of DVD-GAN."""

    resolution: Literal[16, 32, 64, 128, 256]
    """Height and width of the frames in pixels."""
    channels: Count = 3
    """Colour channels."""
    frames: Annotated[int, Field(ge=4)] = 12
    """T, frames of a clip; the temporal discriminator halves them twice."""
    spatial_frames: Count = 8
    """k, frames of each clip that the spatial discriminator sees; at most `frames`."""
    generator_width: Count = 96
    """ch of the generator: channels of a layer are multiples of it; 96 is BigGAN's."""
    discriminator_width: Count = 96
    """ch of both discriminators."""
    latent_dim: Count = 120
    """Dimension of z."""
    shared_dim: Count = 120
    """Dimension of the class embedding e(y)."""
    sn_eps: Positive = 1e-6
    """Smallest norm in the power iteration of spectral normalisation."""
    d_steps: Count = 2
    """Discriminator updates per generator update."""
    generator_lr: Positive = 1e-4
    """Adam's learning rate of the generator."""
    discriminator_lr: Positive = 5e-4
    """Adam's learning rate of the discriminators."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Adam's decay rates."""

    @model_validator(mode="after")
    def _check_frames(self) -> DVDGANConfig:
        if self.spatial_frames > self.frames:
            raise ValueError(f"spatial_frames: {self.spatial_frames} are more than the {self.frames} frames of a clip")
        return self


_KINETICS = {"classes": 600}


class DVDGAN(LatentSystem):
    """GAN of clips: a recurrent generator, and discriminators of single frames and of motion."""

    name: ClassVar[str] = "dvdgan"
    family: ClassVar[str] = "video"
    paper: ClassVar[str] = (
        "A. Clark, J. Donahue, K. Simonyan: Adversarial Video Generation on Complex Datasets, 2019, arXiv:1907.06571"
    )
    modality: ClassVar[str] = "clips"
    Config: ClassVar[type[SystemConfig]] = DVDGANConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny16": {
            "resolution": 16, "channels": 1, "frames": 8, "spatial_frames": 4, "generator_width": 8,
            "discriminator_width": 8, "latent_dim": 16, "shared_dim": 16, "d_steps": 1, "generator_lr": 2e-4,
        },
        "kinetics600-64": {**_KINETICS, "resolution": 64},
        "kinetics600-64-48frames": {**_KINETICS, "resolution": 64, "frames": 48},
        "kinetics600-128": {**_KINETICS, "resolution": 128},
        "kinetics600-256": {**_KINETICS, "resolution": 256},
    }  # fmt: skip
    data_fields: ClassVar[tuple[str, ...]] = ("channels", "classes", "frames")
    takes: ClassVar[tuple[str, ...]] = ("clips",)

    config: DVDGANConfig

    def __init__(self, config: DVDGANConfig) -> None:
        self.config = config
        self.generator, self.discriminator = DVDGANGenerator(config), DVDGANDiscriminator(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        rates = {"generator": c.generator_lr, "discriminator": c.discriminator_lr}
        return {k: OptimizerDefaults("adam", lr=lr, betas=c.betas) for k, lr in rates.items()}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [
            Update("discriminator", "discriminator", self.discriminator_loss, repeats=self.config.d_steps),
            Update("generator", "generator", self.generator_loss),
        ]

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            init_weights(network, generator, "orthogonal")

    def _draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw z [n, latent_dim] and uniformly distributed classes [n]."""
        z = normal_latents((n, self.config.latent_dim), generator)
        return z, torch.randint(self.config.classes, (n,), generator=generator, device=generator.device)

    def _scores(self, clips: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """D_S and D_T of clips, [N] each; D_S of k different frames of each, drawn uniformly."""
        order = torch.rand(clips.shape[:2], generator=generator, device=generator.device).argsort(1)
        scores: tuple[Tensor, Tensor] = self.discriminator(clips, order[:, : self.config.spatial_frames], labels)
        return scores

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Hinge losses E[relu(1 - D(x, y))] + E[relu(1 + D(G(z, y'), y'))] of D_S and of D_T, summed (section 3)."""
        z, labels = self._draw(len(batch), generator)
        with torch.no_grad():
            fakes = self.generator(z, labels)
        clips, labels = torch.cat([fakes, batch["clips"]]), torch.cat([labels, batch.labels])
        # One pass over both: neither normalises anything over the batch, so this equals two passes.
        scores = torch.stack(self._scores(clips, labels, generator))
        fake, real = scores.chunk(2, 1)
        value = (F.relu(1 - real) + F.relu(1 + fake)).mean(1).sum()
        scalars = {"scores/real": real.mean(1).sum(), "scores/fake": fake.mean(1).sum()}
        for i, name in enumerate(("spatial", "temporal")):
            scalars |= {f"scores/{name}_real": real[i].mean(), f"scores/{name}_fake": fake[i].mean()}
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """-E[D_S(G(z, y), y) + D_T(G(z, y), y)]."""
        z, labels = self._draw(len(batch), generator)
        spatial, temporal = self._scores(self.generator(z, labels), labels, generator)
        return Loss(-(spatial + temporal).mean())

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002  # z is all that is truncated
        clips: Tensor = self.generator(latents["latents"], labels)
        return clips.float()
