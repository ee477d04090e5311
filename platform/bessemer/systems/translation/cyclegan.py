"""CycleGAN (Zhu et al. 2017, arXiv:1703.10593): translation between two domains, learned without pairs.

G translates X to Y and F translates back; D_X and D_Y judge patches. The networks are those of the appendix, 7.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Conv2d
from bessemer.nn.image_pool import ImagePool
from bessemer.nn.init import init_weights
from bessemer.nn.instance_norm import InstanceNorm
from bessemer.nn.jitter import jitter
from bessemer.nn.unset import Unset
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.translating import TranslationSystem
from bessemer.systems.translation.pix2pix import PatchDiscriminator

__all__ = ["CycleGAN", "CycleGANConfig", "ResNetGenerator"]

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CycleGANConfig(SystemConfig):
    """Configuration of CycleGAN; the defaults are those of 256 pixels."""

    resolution: Annotated[int, Field(ge=16)] = 256
    """Height and width of the images in pixels, a multiple of 4."""
    width: Count = 64
    """Channels of the generators' first layer; the blocks have 4 times as many."""
    blocks: Count = 9
    """Residual blocks of a generator: 6 at 128 pixels, 9 at 256 and more."""
    discriminator_width: Count = 64
    """Channels of the discriminators' first layer; later ones have up to 8 times as many."""
    patch_layers: Annotated[int, Field(ge=0, le=6)] = 3
    """Layers of the discriminators that halve the image; 3 judge patches of 70 pixels."""
    cycle: Weight = 10.0
    """λ, weight of the cycle consistency loss."""
    identity: Weight = 0.0
    """Weight of the identity loss; the paper has 0.5 λ from paintings to photographs, and none elsewhere."""
    pool: Annotated[int, Field(ge=0)] = 50
    """Generated images of each domain that are kept to show the discriminators; 0 for none."""
    jitter: Annotated[int, Field(ge=0)] = 30
    """Pixels by which images are enlarged before they are cropped back at a random place, as in the authors' code."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Adam's learning rate in all networks."""

    @model_validator(mode="after")
    def _check(self) -> CycleGANConfig:
        if self.resolution % 4:
            raise ValueError(f"resolution: {self.resolution} is no multiple of 4, and two layers halve it")
        if self.resolution < (least := 4 << self.patch_layers):
            raise ValueError(
                f"patch_layers: {self.patch_layers} need a resolution of {least}, which is {self.resolution}"
            )
        return self


class _ReflectConv2d(Unset, nn.Conv2d):
    """A convolution that keeps the size; beyond the border the image is reflected."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode="reflect")


class _UpConv2d(Unset, nn.ConvTranspose2d):
    """A 3×3 convolution of stride 1/2, which doubles height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 2, padding=1, output_padding=1)


class _Block(nn.Module):
    """Rk: two 3×3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _ReflectConv2d(width, width, 3), InstanceNorm(width), nn.ReLU(),
            _ReflectConv2d(width, width, 3), InstanceNorm(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class ResNetGenerator(nn.Sequential):
    """c7s1-64, d128, d256, R256 (nine times), u128, u64, c7s1-3: images [N, C, R, R] -> the same, in [-1, 1]."""

    def __init__(self, c: CycleGANConfig) -> None:
        w = c.width
        super().__init__(
            _ReflectConv2d(c.channels, w, 7), InstanceNorm(w), nn.ReLU(),
            Conv2d(w, 2 * w, stride=2), InstanceNorm(2 * w), nn.ReLU(),
            Conv2d(2 * w, 4 * w, stride=2), InstanceNorm(4 * w), nn.ReLU(),
            *(_Block(4 * w) for _ in range(c.blocks)),
            _UpConv2d(4 * w, 2 * w), InstanceNorm(2 * w), nn.ReLU(),
            _UpConv2d(2 * w, w), InstanceNorm(w), nn.ReLU(),
            _ReflectConv2d(w, c.channels, 7), nn.Tanh(),
        )  # fmt: skip


class _Generators(nn.Module):
    """G: X -> Y, and F: Y -> X, which one optimizer trains together."""

    def __init__(self, c: CycleGANConfig) -> None:
        super().__init__()
        self.g, self.f = ResNetGenerator(c), ResNetGenerator(c)


class _Discriminators(nn.Module):
    """D_X and D_Y, and what they were shown of either domain."""

    def __init__(self, c: CycleGANConfig) -> None:
        super().__init__()
        self.x, self.y = (
            PatchDiscriminator(c.channels, c.discriminator_width, c.patch_layers, affine=False) for _ in range(2)
        )
        shape = (c.channels, c.resolution, c.resolution)
        self.pool_x, self.pool_y = ImagePool(c.pool, shape), ImagePool(c.pool, shape)


class CycleGAN(TranslationSystem):
    """Two GANs between two domains, each translating back what the other made: unpaired translation."""

    name: ClassVar[str] = "cyclegan"
    family: ClassVar[str] = "translation"
    paper: ClassVar[str] = (
        "J.-Y. Zhu, T. Park, P. Isola, A. A. Efros: Unpaired Image-to-Image Translation using Cycle-Consistent "
        "Adversarial Networks, ICCV 2017, arXiv:1703.10593"
    )
    modality: ClassVar[str] = "two domains of images"
    takes: ClassVar[tuple[str, ...]] = ("images", "others")
    Config: ClassVar[type[SystemConfig]] = CycleGANConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny32": {
            "resolution": 32, "width": 16, "blocks": 2, "discriminator_width": 16, "patch_layers": 1, "jitter": 2,
        },
        "unpaired256": {},
        "unpaired128": {"resolution": 128, "blocks": 6, "jitter": 15},
        "paintings256": {"identity": 5.0},
    }  # fmt: skip

    config: CycleGANConfig

    def __init__(self, config: CycleGANConfig) -> None:
        self.config = config
        self.generator, self.discriminator = _Generators(config), _Discriminators(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return dict.fromkeys(self.networks(), OptimizerDefaults("adam", lr=self.config.lr, betas=(0.5, 0.999)))

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [
            Update("generator", "generator", self.generator_loss),
            Update("discriminator", "discriminator", self.discriminator_loss),
        ]

    def refusal(self, slices: int) -> str | None:
        pool = self.config.pool
        return f"{pool} images (system.config.pool) are no multiple of {slices}" if pool % slices else None

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            init_weights(network, generator, "normal", biases="zeros")

    def _domains(self, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images x of X and y of Y, each jittered by itself."""
        (x,), (y,) = (jitter([batch[name]], self.config.jitter, generator) for name in self.takes)
        return x, y

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """The generators' side of eq. 3, with squared errors in place of logarithms (section 4), and the identity loss.

        E[(D_Y(G(x)) - 1)²] + E[(D_X(F(y)) - 1)²] + λ·(E|F(G(x)) - x| + E|G(F(y)) - y|) (eq. 2)
        + weight·(E|G(y) - y| + E|F(x) - x|) (section 5.2).
        """
        c, g, f, d = self.config, self.generator.g, self.generator.f, self.discriminator
        x, y = self._domains(batch, generator)
        fake_y, fake_x = g(x), f(y)
        adversarial = (d.y(fake_y) - 1).square().mean() + (d.x(fake_x) - 1).square().mean()
        cycle = F.l1_loss(f(fake_y), x) + F.l1_loss(g(fake_x), y)
        value, scalars = adversarial + c.cycle * cycle, {"distance/adversarial": adversarial, "distance/cycle": cycle}
        if c.identity:
            scalars["distance/identity"] = F.l1_loss(g(y), y) + F.l1_loss(f(x), x)
            value = value + c.identity * scalars["distance/identity"]
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Half of E[(D(real) - 1)²] + E[D(made)²] for each domain; of images that were made, a pool is shown."""
        d = self.discriminator
        x, y = self._domains(batch, generator)
        with torch.no_grad():
            fake_x, fake_y = self.generator.f(y).to(x.dtype), self.generator.g(x).to(y.dtype)
        shown_x = d.pool_x.query(fake_x, batch.slice, batch.slices, generator)
        shown_y = d.pool_y.query(fake_y, batch.slice, batch.slices, generator)
        real, made = (d.x(x), d.y(y)), (d.x(shown_x), d.y(shown_y))
        value = sum(((r - 1).square().mean() + m.square().mean()) / 2 for r, m in zip(real, made, strict=True))
        scalars = {"scores/real": torch.stack([r.mean() for r in real]).mean()}
        scalars["scores/fake"] = torch.stack([m.mean() for m in made]).mean()
        return Loss(torch.as_tensor(value), {k: v.detach() for k, v in scalars.items()})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    @torch.no_grad()
    def sample_for(self, batch: Batch, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """G(x): the first domain's images, translated to the second; nothing is drawn."""
        images: Tensor = self.generator.g(batch.images)
        return images.float()

    @torch.no_grad()
    def views(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """x, G(x), F(G(x)), and y, F(y), G(F(y)) where there are images of the second domain."""
        x, fake_y = batch.images, self.sample_for(batch, generator)
        shown = {"x": x, "G(x)": fake_y, "F(G(x))": self.generator.f(fake_y)}
        if "others" in batch.names:
            y = batch["others"]
            shown |= {"y": y, "F(y)": (fake_x := self.generator.f(y)), "G(F(y))": self.generator.g(fake_x)}
        return {name: images.float() for name, images in shown.items()}
