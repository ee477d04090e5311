"""BigGAN (Brock, Donahue and Simonyan 2019, arXiv:1809.11096), section 3 and appendix B.

Where the paper is silent the networks and presets follow BigGAN-PyTorch and its launch scripts; parameter counts are
those of that code and of Google's compare_gan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.attention import SelfAttention
from bessemer.nn.embedding import embedding
from bessemer.nn.init import WeightInit, init_weights
from bessemer.nn.latents import normal_latents
from bessemer.nn.norm import AffineBatchNorm, ConditionalBatchNorm, renew_statistics
from bessemer.nn.regularise import modified_orthogonal
from bessemer.nn.resample import upsample
from bessemer.nn.spectral import SNConv2d, SNEmbedding, SNLinear
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update

__all__ = ["BigGAN", "BigGANConfig", "BigGANDiscriminator", "BigGANGenerator"]

G_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}
"""Resolution -> channels over ch at 4x4 and after each block of G, each of which doubles the resolution."""
D_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}
"""Resolution -> channels over ch after each block of D, all of which but the last halve the resolution (two at 32)."""

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
    thin_discriminator: bool = False
    """Change the number of channels in a block's second convolution instead of its first (SN-GAN)."""
    shortcut: Literal["resampled", "widened"] = "resampled"
    """Discriminator blocks with a 1x1 convolution on the shortcut: all that downsample or change the number of
    channels (BigGAN-PyTorch), or only those that change it (compare_gan)."""

    @model_validator(mode="after")
    def _check_latent(self) -> BigGANConfig:
        chunks = len(G_WIDTHS[self.resolution])
        if self.hierarchical and self.shared_dim == 0:
            raise ValueError("hierarchical needs shared_dim > 0: chunks of z join the shared class embedding")
        if self.hierarchical and self.latent_dim % chunks:
            raise ValueError(
                f"latent_dim {self.latent_dim} must be a multiple of {chunks} at resolution {self.resolution}: one "
                f"chunk for the linear layer and for each of {chunks - 1} blocks; or set hierarchical to false"
            )
        return self


def conditional_norm(c: CommonConfig, channels: int, condition_dim: int) -> ConditionalBatchNorm:
    """Class-conditional BN: SN-linear in the condition [N, condition_dim], or, for 0, embeddings of the class [N]."""

    def table() -> nn.Module:
        if condition_dim:
            return SNLinear(condition_dim, channels, bias=False, eps=c.sn_eps)
        return embedding(c.classes, channels)

    return ConditionalBatchNorm(channels, table(), table(), eps=c.bn_eps, momentum=c.bn_momentum)


class _GeneratorBlock(nn.Module):
    """Residual block of G that doubles the resolution (figure 15b)."""

    def __init__(self, c: BigGANConfig, in_channels: int, out_channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm1 = conditional_norm(c, in_channels, condition_dim)
        self.conv1 = SNConv2d(in_channels, out_channels, resample="up", eps=c.sn_eps)
        self.norm2 = conditional_norm(c, out_channels, condition_dim)
        self.conv2 = SNConv2d(out_channels, out_channels, eps=c.sn_eps)
        self.shortcut = SNConv2d(in_channels, out_channels, 1, eps=c.sn_eps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x, condition), inplace=True))
        h = self.conv2(F.relu(self.norm2(h, condition), inplace=True))
        # The 1×1 convolution and nearest-neighbour upsampling commute; in this order it costs a quarter.
        out: Tensor = h + upsample(self.shortcut(x))
        return out


class BigGANGenerator(nn.Module):
    """G(z, y) (table 4a): z [N, latent_dim] and classes [N] -> images [N, channels, R, R] in [-1, 1]."""

    def __init__(self, c: BigGANConfig) -> None:
        super().__init__()
        widths = [c.generator_width * w for w in G_WIDTHS[c.resolution]]
        self.chunk = c.latent_dim // len(widths) if c.hierarchical else c.latent_dim
        self.hierarchical = c.hierarchical
        # Without a shared embedding each normalisation layer looks the class up in its own table.
        condition_dim = c.shared_dim + self.chunk * c.hierarchical
        # Without spectral norm, which cripples G at random here (BigGAN-PyTorch).
        self.shared = embedding(c.classes, c.shared_dim) if c.shared_dim else None
        self.linear = SNLinear(self.chunk, widths[0] * 4 * 4, eps=c.sn_eps)
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(_GeneratorBlock(c, before, after, condition_dim))
            if 8 << i in c.generator_attention:
                self.attention[str(i)] = SelfAttention(after, eps=c.sn_eps)
        self.norm = AffineBatchNorm(widths[-1], eps=c.bn_eps, momentum=c.bn_momentum)
        self.conv = SNConv2d(widths[-1], c.channels, eps=c.sn_eps)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        condition = labels if self.shared is None else self.shared(labels)
        conditions = [condition] * len(self.blocks)
        if self.hierarchical:
            z, *chunks = torch.split(z, self.chunk, 1)
            conditions = [torch.cat([condition, chunk], 1) for chunk in chunks]
        h = self.linear(z).view(z.shape[0], -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for i, (block, block_condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            h = block(h, block_condition)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return torch.tanh(self.conv(F.relu(self.norm(h), inplace=True)))


class _DiscriminatorBlock(nn.Module):
    """Residual block of D (figure 15c); the first of a network sees images and has no ReLU before it."""

    def __init__(self, c: BigGANConfig, in_channels: int, out_channels: int, *, first: bool, down: bool) -> None:
        super().__init__()
        hidden = in_channels if c.thin_discriminator else out_channels
        self.first, self.down = first, down
        self.conv1 = SNConv2d(in_channels, hidden, eps=c.sn_eps)
        self.conv2 = SNConv2d(hidden, out_channels, resample="down" if down else None, eps=c.sn_eps)
        learned = in_channels != out_channels or (down and c.shortcut == "resampled")
        self.shortcut = SNConv2d(in_channels, out_channels, 1, eps=c.sn_eps) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(h, inplace=True))
        # Average pooling and the 1×1 convolution commute; in this order it costs a quarter.
        x = F.avg_pool2d(x, 2) if self.down else x
        out: Tensor = h + (x if self.shortcut is None else self.shortcut(x))
        return out


class BigGANDiscriminator(nn.Module):
    """D(x, y) (table 4b), a projection discriminator: images [N, channels, R, R] and classes [N] -> scores [N]."""

    def __init__(self, c: BigGANConfig) -> None:
        super().__init__()
        widths = [c.channels, *(c.discriminator_width * w for w in D_WIDTHS[c.resolution])]
        downs = 2 if c.resolution == 32 else len(widths) - 2
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleDict()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(_DiscriminatorBlock(c, before, after, first=i == 0, down=i < downs))
            # BigGAN-PyTorch takes all four blocks for 16×16 at 32 px (three are 8×8); so do its parameter counts.
            resolution = 16 if c.resolution == 32 else c.resolution >> min(i + 1, downs)
            if resolution in c.discriminator_attention:
                self.attention[str(i)] = SelfAttention(after, eps=c.sn_eps)
        self.linear = SNLinear(widths[-1], 1, eps=c.sn_eps)
        self.embed = SNEmbedding(c.classes, widths[-1], eps=c.sn_eps)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = x.contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            h = block(h)
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        h = F.relu(h).sum((2, 3))
        scores: Tensor = self.linear(h).squeeze(1) + (self.embed(labels) * h).sum(1)
        return scores


_CIFAR = {
    "resolution": 32, "generator_width": 64, "discriminator_width": 64, "latent_dim": 128, "shared_dim": 0,
    "hierarchical": False, "generator_attention": (), "discriminator_attention": (), "init": "normal",
    "sn_eps": 1e-8, "d_steps": 4, "generator_lr": 2e-4, "discriminator_lr": 2e-4, "adam_eps": 1e-8,
}  # fmt: skip
_SAGAN128 = {
    "resolution": 128, "classes": 1000, "generator_width": 64, "discriminator_width": 64, "latent_dim": 128,
    "shared_dim": 0, "hierarchical": False, "init": "xavier", "sn_eps": 1e-8, "adam_eps": 1e-8,
}  # fmt: skip
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
        "sagan128": _SAGAN128,
        "sngan128": {
            **_SAGAN128, "generator_attention": (), "discriminator_attention": (), "thin_discriminator": True,
            "d_steps": 5, "generator_lr": 2e-4, "discriminator_lr": 2e-4, "betas": (0.0, 0.9),
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
        z, labels = self._draw(len(batch.images), generator)
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
        """Draw images; `truncation` t redraws the entries of z beyond ±t, trading variety for fidelity."""
        z = normal_latents((len(labels), self.config.latent_dim), generator, truncation)
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
