"""Glow (Kingma and Dhariwal 2018, arXiv:1807.03039): steps of actnorm, an invertible 1×1 convolution and a coupling.

The hidden convolutions have biases where the authors' code has actnorm, and zeros around the image where it has a mark
of the border; so the networks have as many parameters as the best known port to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Conv2d
from bessemer.nn.data_init import ActNorm, initialising
from bessemer.nn.dequantise import dequantise, log_volume, undo_dequantise
from bessemer.nn.normal import Normal
from bessemer.nn.precision import full_precision
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["Glow", "GlowConfig", "GlowNetwork", "InvertibleConv"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GlowConfig(SystemConfig):
    """Configuration of Glow."""

    resolution: Count = 32
    """Height and width of the images in pixels; a multiple of 2^levels."""
    channels: Count = 3
    """Colour channels."""
    levels: Count = 3
    """L, levels of the multi-scale architecture."""
    steps: Count = 32
    """K, steps of flow per level."""
    width: Count = 512
    """Channels of the hidden layers in couplings."""
    affine: bool = True
    """Affine couplings; additive ones if not."""
    least_scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Lower bound of the scales of affine couplings. The paper has none, so inverses have no bound: where h is far
    below zero, drawing divides by almost nothing, and the next coupling sees the result. Above 0 an inverse enlarges
    by 1/least_scale at most; the stable variant of Behrmann et al. 2021 (arXiv:2006.09347) has 0.5. Deviations of
    the priors have no bound, as in the authors' code: without one here, bounding them does not keep all samples finite;
    with one, they need none at temperatures up to 1 (benchmarks/README.md)."""
    bits: Annotated[int, Field(ge=1, le=8)] = 8
    """Highest bits of each pixel that are modelled; the rest is cut off."""
    lr: Positive = 1e-3
    """Learning rate of Adamax, which the authors' code has where the paper says Adam; it is warmed up over ten epochs,
    which a job says in `training.lr_schedule`."""

    @model_validator(mode="after")
    def _check(self) -> GlowConfig:
        if self.resolution % (1 << self.levels):
            raise ValueError(f"resolution: {self.resolution} is no multiple of 2^levels = {1 << self.levels}")
        return self


def squeeze(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 4C, H/2, W/2]: blocks of 2×2 pixels become channels."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return F.pixel_shuffle(x, 2)


def _zeros(x: Tensor) -> Tensor:
    """One sum for each of [N, ...], in float32 at least."""
    return torch.zeros(x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


class InvertibleConv(nn.Module):
    """A 1×1 convolution W = P L (U + diag(s)) (eq. 10), whose log-determinant is H·W·Σ log|s| (eq. 11).

    W starts as a random rotation. P and the signs of s stay as they are.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_s = nn.Parameter(torch.zeros(channels))
        self.register_buffer("permutation", torch.eye(channels))
        self.register_buffer("signs", torch.ones(channels))

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        """Draw a rotation and factor it."""
        n = len(self.log_s)
        normal = torch.randn(n, n, generator=generator, device=generator.device, dtype=torch.float64)
        P, L, U = torch.linalg.lu(torch.linalg.qr(normal)[0])
        s = U.diagonal()
        self.permutation.copy_(P)
        self.signs.copy_(s.sign())
        self.log_s.copy_(s.abs().log())
        self.lower.copy_(L.tril(-1))
        self.upper.copy_(U.triu(1))

    def weight(self) -> Tensor:
        """W, [C, C]."""
        eye = torch.eye(len(self.log_s), device=self.log_s.device, dtype=self.log_s.dtype)
        U = self.upper.triu(1) + torch.diag(self.signs * self.log_s.exp())
        return self.permutation @ (self.lower.tril(-1) + eye) @ U

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> the same shape, and the log-determinant, a scalar."""
        with full_precision(x):
            return F.conv2d(x, self.weight()[:, :, None, None]), self.log_s.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y: Tensor) -> Tensor:
        """The x that :meth:`forward` maps to y; W is inverted in float64."""
        with full_precision(y):
            inverse = torch.linalg.inv(self.weight().double()).to(y.dtype)
            return F.conv2d(y, inverse[:, :, None, None])


class ZeroConv(nn.Module):
    """A 3×3 convolution that starts at zero, times exp(3·scale). Ones around the image tell it where the border is."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels)
        self.scale = nn.Parameter(torch.zeros(1, out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), self.conv.weight, self.conv.bias)
        return y.to(torch.promote_types(y.dtype, torch.float32)) * (3 * self.scale).exp()


class Coupling(nn.Module):
    """Half of the channels move the other half (table 1): x_b -> (x_b + t)·s, or x_b + t.

    s = m + (1 - m)·σ(h + 2), where m is the least scale; 0 in the paper.
    """

    def __init__(self, channels: int, width: int, *, affine: bool, least_scale: float = 0.0) -> None:
        super().__init__()
        self.affine, self.least_scale = affine, least_scale
        self.conv1, self.conv2 = Conv2d(channels // 2, width), Conv2d(width, width, 1)
        self.conv3 = ZeroConv(width, channels if affine else channels // 2)

    def init_weights(self, generator: Generator) -> None:
        """N(0, 0.05²) in the hidden convolutions, zero in the last."""
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, 0.0, 0.05, generator=generator)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        for p in self.conv3.parameters():
            nn.init.zeros_(p)

    def _shift_and_log_scale(self, a: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv3(F.relu(self.conv2(F.relu(self.conv1(a)))))
        if not self.affine:
            return h, torch.zeros_like(h)
        shift, raw = h.chunk(2, 1)
        if self.least_scale == 0:
            return shift, F.logsigmoid(raw + 2)
        return shift, torch.log(self.least_scale + (1 - self.least_scale) * torch.sigmoid(raw + 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> the same shape, and the log-determinants [N]."""
        a, b = x.chunk(2, 1)
        shift, log_scale = self._shift_and_log_scale(a)
        return torch.cat([a, (b + shift) * log_scale.exp()], 1), log_scale.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        """The x that :meth:`forward` maps to y."""
        a, b = y.chunk(2, 1)
        shift, log_scale = self._shift_and_log_scale(a)
        return torch.cat([a, b * (-log_scale).exp() - shift], 1)


class Level(nn.Module):
    """Squeeze, K steps of flow, and a split unless it is the last; what leaves has a normal prior (figure 2b)."""

    def __init__(self, c: GlowConfig, channels: int, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.steps = nn.ModuleList()
        for _ in range(c.steps):
            coupling = Coupling(channels, c.width, affine=c.affine, least_scale=c.least_scale)
            self.steps.extend([ActNorm(channels), InvertibleConv(channels), coupling])
        # The prior of the half that leaves depends on the half that stays; the last one's, on nothing but the border.
        self.prior = ZeroConv(channels, 2 * channels) if last else ZeroConv(channels // 2, channels)

    def _prior(self, kept: Tensor) -> Normal:
        mu, log_sigma = self.prior(torch.zeros_like(kept) if self.last else kept).chunk(2, 1)
        return Normal(mu, log_sigma.exp())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X -> what stays (the same as what leaves, at the last level), what leaves as N(0, 1), log p + log|det|."""
        h, log_det = squeeze(x), _zeros(x)
        for part in self.steps:
            h, more = part(h)
            log_det = log_det + more
        kept, z = (h, h) if self.last else h.chunk(2, 1)
        prior = self._prior(kept)
        return kept, (z - prior.mu) / prior.sigma, log_det + prior.log_prob(z).sum((1, 2, 3))

    def inverse(self, kept: Tensor, noise: Tensor) -> Tensor:
        """What :meth:`forward` was given, from what stayed and the noise that left."""
        prior = self._prior(kept)
        z = prior.mu + prior.sigma * noise
        h = z if self.last else torch.cat([kept, z], 1)
        for part in reversed(self.steps):
            h = part.inverse(h)  # type: ignore[operator]
        return unsqueeze(h)


class GlowNetwork(nn.Module):
    """x [N, C, H, W] in [-0.5, 0.5] <-> noise of each level."""

    def __init__(self, c: GlowConfig) -> None:
        super().__init__()
        channels = [4 * c.channels << i for i in range(c.levels)]
        self.levels = nn.ModuleList(Level(c, n, last=i == c.levels - 1) for i, n in enumerate(channels))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The noise, from the first level to the last, and log p(x), [N] in nats."""
        noise, log_p = [], _zeros(x)
        for level in self.levels:
            x, z, more = level(x)
            noise.append(z)
            log_p = log_p + more
        return noise, log_p

    def inverse(self, noise: Sequence[Tensor]) -> Tensor:
        """The x whose noise this is."""
        x = noise[-1]  # of its shape alone the last level makes use
        for level, z in zip(reversed(self.levels), reversed(noise), strict=True):
            x = level.inverse(x, z)  # type: ignore[operator]
        return x


class Glow(LikelihoodSystem):
    """Normalizing flow with exact likelihoods, invertible 1×1 convolutions and data-dependent initialisation."""

    name: ClassVar[str] = "glow"
    family: ClassVar[str] = "flow"
    paper: ClassVar[str] = (
        "D. P. Kingma, P. Dhariwal: Glow: Generative Flow with Invertible 1x1 Convolutions, NeurIPS 2018, "
        "arXiv:1807.03039"
    )
    Config: ClassVar[type[SystemConfig]] = GlowConfig
    init_images: ClassVar[int] = 256
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {"resolution": 8, "channels": 1, "levels": 2, "steps": 8, "width": 32, "lr": 3e-3},
        "cifar10": {},
        "imagenet32": {"steps": 48},
        "imagenet64": {"resolution": 64, "steps": 48, "levels": 4},
        "celebahq256": {"resolution": 256, "levels": 6, "affine": False, "bits": 5},
    }

    config: GlowConfig

    def __init__(self, config: GlowConfig) -> None:
        self.config = config
        self.flow = GlowNetwork(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"flow": self.flow}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"flow": OptimizerDefaults("adamax", lr=self.config.lr, betas=(0.9, 0.999))}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [Update("likelihood", "flow", self.loss, whole_weights=True)]

    def init_weights(self, generator: Generator) -> None:
        for layer in self.flow.modules():
            if isinstance(layer, (InvertibleConv, Coupling)):
                layer.init_weights(generator)
            elif isinstance(layer, (ActNorm, Level)):
                for p in (layer.prior if isinstance(layer, Level) else layer).parameters():
                    nn.init.zeros_(p)

    def init_from_data(self, batch: Batch, generator: Generator) -> None:
        """Every actnorm leaves these images with mean 0 and variance 1 (section 3.1)."""
        with initialising(self.flow):
            self.flow(self._seen(batch.images, generator))

    def _seen(self, images: Tensor, generator: Generator) -> Tensor:
        """Dequantised images in [-0.5, 0.5)."""
        return dequantise(images, self.config.bits, generator) / 2

    def _log_likelihood(self, images: Tensor, generator: Generator) -> Tensor:
        """Log p(x) + log of the volume of a pixel's cell (eq. 2), [N] in nats."""
        x = self._seen(images, generator)
        _, log_p = self.flow(x)
        values = x[0].numel()
        total: Tensor = log_p + (log_volume(values, self.config.bits) - values * math.log(2))
        return total

    def loss(self, batch: Batch, generator: Generator) -> Loss:
        """-log p(x) in bits per dimension (eq. 1)."""
        nats = -self._log_likelihood(batch.images, generator).mean()
        return Loss(nats / (math.log(2) * batch.images[0].numel()))

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("flow",)

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        c = self.config
        shapes, channels, size = {}, 4 * c.channels, c.resolution // 2
        for i in range(c.levels):
            last = i == c.levels - 1
            shapes[f"noise_{i}"] = (channels if last else channels // 2, size, size)
            channels, size = 2 * channels, size // 2
        return shapes

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw images; `truncation` is T, which σ of every prior is multiplied by (section 6).

        With additive couplings that is the density to the power of 1/T², normalised.
        """
        latents = {
            name: (1.0 if truncation is None else truncation)
            * torch.randn(len(labels), *shape, generator=generator, device=generator.device)
            for name, shape in self.latent_shapes.items()
        }
        return self.generate(latents, labels)

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        x = self.flow.inverse([latents[name] for name in self.latent_shapes])
        return undo_dequantise(2 * x.float(), self.config.bits)

    @property
    def likelihood_protocol(self) -> str:
        return f"{self.config.bits} bits, dequantised"

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:  # noqa: ARG002
        return self._log_likelihood(batch.images, generator).double()
