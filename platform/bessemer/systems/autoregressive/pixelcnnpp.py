"""PixelCNN++ (Salimans, Karpathy, Chen and Kingma 2017, arXiv:1701.05517): images pixel by pixel, in raster order.

Two streams of gated residual layers run down and up through three resolutions: `u` sees the rows above, `ul` also the
pixels to the left. What comes out is a discretised mixture of logistics for each pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.data_init import initialising
from bessemer.nn.likelihoods import LogisticMixture, quantise
from bessemer.systems.autoregressive.shifted import ShiftedConv2d, ShiftedDeconv2d, blank_map, put
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["CachedSampler", "PixelCNNPP", "PixelCNNPPConfig", "PixelCNNPPNetwork"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DOWN, RIGHT = (2, 3), (2, 2)
"""Kernels of the two streams."""


class PixelCNNPPConfig(SystemConfig):
    """Configuration of PixelCNN++."""

    resolution: Count = 32
    """Height and width of the images in pixels; a multiple of 4."""
    channels: Literal[1, 3] = 3
    """Colour channels."""
    width: Count = 160
    """Channels of all layers."""
    layers: Count = 5
    """Gated residual layers at each resolution, on the way down; on the way up there is one more at the last two."""
    components: Count = 10
    """Components of the mixture."""
    bits: Annotated[int, Field(ge=1, le=8)] = 8
    """Highest bits of each pixel that are modelled; the rest is cut off."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the features in each residual layer that are dropped in training."""
    lr: Positive = 1e-3
    """Adam's learning rate; the paper multiplies it by 0.999995 after each step."""

    @model_validator(mode="after")
    def _check(self) -> PixelCNNPPConfig:
        if self.resolution % 4:
            raise ValueError(f"resolution: {self.resolution} is no multiple of 4, and two layers halve it")
        return self


def concat_elu(x: Tensor) -> Tensor:
    """elu([x, -x]): [N, C, H, W] -> [N, 2C, H, W]."""
    return F.elu(torch.cat([x, -x], 1))


class GatedResidual(nn.Module):
    """x + a·σ(b), (a, b) from two convolutions of the stream's kind and a 1×1 one of what comes from elsewhere."""

    def __init__(self, width: int, kernel: tuple[int, int], extra: int) -> None:
        super().__init__()
        self.conv1 = ShiftedConv2d(2 * width, width, kernel)
        self.skip = ShiftedConv2d(2 * extra, width, (1, 1)) if extra else None
        self.conv2 = ShiftedConv2d(2 * width, 2 * width, kernel, init_scale=0.1)

    def forward(self, x: Tensor, extra: Tensor | None, dropout: float, generator: Generator | None) -> Tensor:
        """Maps [N, width, H, W] and [N, extra, H, W] to the shape of x. Without a generator nothing is dropped."""
        h = self.conv1(concat_elu(x))
        if self.skip is not None:
            assert extra is not None
            h = h + self.skip(concat_elu(extra))
        h = concat_elu(h)
        if generator is not None and dropout:
            u = torch.rand(h.shape, generator=generator, device=generator.device)
            h = h * (u >= dropout).to(h.dtype) / (1 - dropout)
        a, b = self.conv2(h).chunk(2, 1)
        out: Tensor = x + a * torch.sigmoid(b)
        return out


@dataclass(frozen=True)
class _Op:
    """One layer of both streams: reads map `source` and others, writes map `target`."""

    kind: Literal["residual", "half", "double"]
    u: Any
    ul: Any
    level: int
    """The written map has the resolution over 2^level."""
    source: int
    target: int
    skip: int | None = None
    """Map of the way down that a layer on the way up listens to."""


class PixelCNNPPNetwork(nn.Module):
    """Maps [N, inputs, H, W] -> parameters for each pixel [N, outputs, H, W], each from earlier pixels alone."""

    def __init__(self, inputs: int, outputs: int, *, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        f, n, self.dropout = width, layers, dropout
        inputs += 1  # ones, which tell where the image ends
        self.first_u = ShiftedConv2d(inputs, f, DOWN)
        self.first_above, self.first_left = ShiftedConv2d(inputs, f, (1, 3)), ShiftedConv2d(inputs, f, (2, 1))
        self.u, self.ul = nn.ModuleList(), nn.ModuleList()
        self.ops: list[_Op] = []
        last, kept = 0, [0]

        def add(kind: Any, u: nn.Module, ul: nn.Module, level: int, skip: int | None = None) -> None:
            nonlocal last
            self.u.append(u)
            self.ul.append(ul)
            self.ops.append(_Op(kind, u, ul, level, last, len(self.ops) + 1, skip))
            last = len(self.ops)

        for level in range(3):
            for _ in range(n):
                add("residual", GatedResidual(f, DOWN, 0), GatedResidual(f, RIGHT, f), level)
                kept.append(last)
            if level < 2:
                add("half", ShiftedConv2d(f, f, DOWN, stride=2), ShiftedConv2d(f, f, RIGHT, stride=2), level + 1)
                kept.append(last)
        last = kept.pop()
        for level in (2, 1, 0):
            for _ in range(n if level == 2 else n + 1):
                add("residual", GatedResidual(f, DOWN, f), GatedResidual(f, RIGHT, 2 * f), level, kept.pop())
            if level:
                add("double", ShiftedDeconv2d(f, f, DOWN), ShiftedDeconv2d(f, f, RIGHT), level - 1)
        assert not kept
        self.out = ShiftedConv2d(f, outputs, (1, 1))

    def forward(self, x: Tensor, generator: Generator | None = None, condition: Tensor | None = None) -> Tensor:
        """The parameters.

        Args:
            x: what is drawn pixel by pixel.
            generator: draws what is dropped, in training.
            condition: [N, width, H, W] that each pixel sees where it is.
        """
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        above, left = F.pad(x, (0, 0, 1, 0))[:, :, :-1], F.pad(x, (1, 0))[..., :-1]  # no pixel sees itself
        u, ul = [self.first_u(above)], [self.first_above(above) + self.first_left(left)]
        if condition is not None:
            ul[0] = ul[0] + condition
        for op in self.ops:
            if op.kind == "residual":
                extra_u = None if op.skip is None else u[op.skip]
                u.append(op.u(u[op.source], extra_u, self.dropout, generator))
                extra_ul = u[op.target] if op.skip is None else torch.cat([u[op.target], ul[op.skip]], 1)
                ul.append(op.ul(ul[op.source], extra_ul, self.dropout, generator))
            else:
                u.append(op.u(u[op.source]))
                ul.append(op.ul(ul[op.source]))
        parameters: Tensor = self.out(F.elu(ul[-1]))
        return parameters


class CachedSampler:
    """Draws pixels one after the other and computes no map twice: `u` row by row, `ul` pixel by pixel.

    Maps at a half and a quarter of the resolution move only with every second and fourth row or pixel (the idea of
    Ramachandran et al. 2017, arXiv:1704.06001).
    """

    def __init__(self, network: PixelCNNPPNetwork, n: int, side: int, condition: Tensor | None = None) -> None:
        self.net, self.side, self.condition = network, side, condition
        f, inputs, *_ = network.first_u.weight.shape
        like = network.out.weight.new_zeros(n)
        self.above, self.left = (blank_map(like, inputs, side, side) for _ in range(2))
        ones = like.new_ones(n, 1, side, side)
        put(self.above[:, -1:], ones[:, :, 1:], 1, 0)
        put(self.left[:, -1:], ones[..., 1:], 0, 1)
        sizes = [side, *(side >> op.level for op in network.ops)]
        self.u, self.ul = ([blank_map(like, f, s, s) for s in sizes] for _ in range(2))
        self.inner: dict[tuple[int, int], Tensor] = {}
        """What a residual layer's two convolutions read."""
        for layer, op in enumerate(network.ops):
            if op.kind == "residual":
                s = side >> op.level
                for stream in range(4):
                    self.inner[layer, stream] = blank_map(like, 2 * f, s, s)
        layers = (m for m in network.modules() if isinstance(m, (ShiftedConv2d, ShiftedDeconv2d)))
        self.weights: dict[nn.Module, Tensor] = {m: m.effective_weight() for m in layers}

    def _residual(
        self, number: int, layer: GatedResidual, x: Tensor, extra: Tensor | None, r: int, a: int, b: int, *, is_u: bool
    ) -> Tensor:
        before, between = (self.inner[number, 2 * is_u + i] for i in range(2))
        put(before, concat_elu(x), r, a)
        h = layer.conv1.at(before, self.weights[layer.conv1], r, a, b)
        if layer.skip is not None:
            assert extra is not None
            h = h + F.conv2d(concat_elu(extra), self.weights[layer.skip], layer.skip.bias)
        put(between, concat_elu(h), r, a)
        gate = layer.conv2.at(between, self.weights[layer.conv2], r, a, b)
        out: Tensor = x + gate.chunk(2, 1)[0] * torch.sigmoid(gate.chunk(2, 1)[1])
        return out

    def _advance(self, row: int, start: int, stop: int, *, is_u: bool) -> None:
        """Compute one stream at columns start to stop of a row, at all resolutions that move with them."""
        net, maps, W = self.net, self.u if is_u else self.ul, self.weights
        if is_u:
            first = net.first_u.at(self.above, W[net.first_u], row, start, stop)
        else:
            first = net.first_above.at(self.above, W[net.first_above], row, start, stop)
            first = first + net.first_left.at(self.left, W[net.first_left], row, start, stop)
            if self.condition is not None:
                first = first + self.condition[:, :, row : row + 1, start:stop]
        put(maps[0], first, row, start)
        for number, op in enumerate(net.ops):
            level = op.level + (op.kind == "double")
            if row % (1 << level) or start % (1 << level):
                continue
            r, a = row >> level, start >> level
            b = a + max(1, (stop - start) >> level)
            layer, source, target = op.u if is_u else op.ul, maps[op.source], maps[op.target]

            def part(m: Tensor, at: tuple[int, int, int] = (r, a, b)) -> Tensor:
                return m[:, :, at[0] + 1 : at[0] + 2, at[1] + 1 : at[2] + 1]

            if op.kind == "half":
                put(target, layer.at(source, W[layer], r, a, b), r, a)
            elif op.kind == "double":
                put(target, layer.at(source, W[layer], r, a, b), 2 * r, 2 * a)
            else:
                heard = [] if is_u else [self.u[op.target]]
                heard += [] if op.skip is None else [maps[op.skip]]
                extra = torch.cat([part(m) for m in heard], 1) if heard else None
                put(target, self._residual(number, layer, part(source), extra, r, a, b, is_u=is_u), r, a)

    def parameters(self, row: int, column: int) -> Tensor:
        """Parameters of the pixel that comes next in raster order, [N, P, 1, 1]."""
        if column == 0:
            self._advance(row, 0, self.side, is_u=True)
        self._advance(row, column, column + 1, is_u=False)
        ul = self.ul[-1][:, :, row + 1 : row + 2, column + 1 : column + 2]
        return F.conv2d(F.elu(ul), self.weights[self.net.out], self.net.out.bias)

    def set(self, pixel: Tensor, row: int, column: int) -> None:
        """Write a pixel [N, C, 1, 1], which later ones will see."""
        last = self.side - 1
        if row < last:
            put(self.above[:, :-1], pixel, row + 1, column)
        if column < last:
            put(self.left[:, :-1], pixel, row, column + 1)


class PixelCNNPP(LikelihoodSystem):
    """Autoregressive model with exact likelihoods, a mixture of logistics for each pixel and cached sampling."""

    name: ClassVar[str] = "pixelcnnpp"
    family: ClassVar[str] = "autoregressive"
    paper: ClassVar[str] = (
        "T. Salimans, A. Karpathy, X. Chen, D. P. Kingma: PixelCNN++: Improving the PixelCNN with Discretized Logistic "
        "Mixture Likelihood and Other Modifications, ICLR 2017, arXiv:1701.05517"
    )
    Config: ClassVar[type[SystemConfig]] = PixelCNNPPConfig
    init_images: ClassVar[int] = 64
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {"resolution": 8, "channels": 1, "width": 16, "layers": 1, "components": 5, "dropout": 0.1},
        "cifar10": {},
        "cifar10-80": {"width": 80},
    }

    config: PixelCNNPPConfig

    def __init__(self, config: PixelCNNPPConfig) -> None:
        self.config = config
        self.pixelcnn = PixelCNNPPNetwork(
            config.channels,
            LogisticMixture.parameters_per_pixel(config.channels, config.components),
            width=config.width,
            layers=config.layers,
            dropout=config.dropout,
        )

    def networks(self) -> dict[str, nn.Module]:
        return {"pixelcnn": self.pixelcnn}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"pixelcnn": OptimizerDefaults("adam", lr=self.config.lr, betas=(0.95, 0.9995))}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [Update("likelihood", "pixelcnn", self.loss)]

    def init_weights(self, generator: Generator) -> None:
        for layer in self.pixelcnn.modules():
            if isinstance(layer, (ShiftedConv2d, ShiftedDeconv2d)):
                layer.init_weights(generator)

    def init_from_data(self, batch: Batch, generator: Generator) -> None:  # noqa: ARG002  # nothing is dropped
        """Gains and biases are such that these images leave each convolution with mean 0 and variance 1 (or 0.01)."""
        with initialising(self.pixelcnn):
            self.pixelcnn(quantise(batch.images, self.config.bits))

    def _mixture(self, parameters: Tensor) -> LogisticMixture:
        return LogisticMixture(parameters, channels=self.config.channels, bits=self.config.bits)

    def loss(self, batch: Batch, generator: Generator) -> Loss:
        """-Σ log p(x_i | x_<i) in bits per dimension (eq. 1 and 2)."""
        x = quantise(batch.images, self.config.bits)
        nats = -self._mixture(self.pixelcnn(x, generator)).log_prob(x).mean()
        return Loss(nats / (math.log(2) * x[0].numel()))

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("pixelcnn",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Draw images pixel by pixel; nothing is truncated."""
        c = self.config
        sampler = CachedSampler(self.pixelcnn, len(labels), c.resolution)
        images = torch.zeros(len(labels), c.channels, c.resolution, c.resolution, device=generator.device)
        for row in range(c.resolution):
            for column in range(c.resolution):
                pixel = self._mixture(sampler.parameters(row, column)).sample(generator)
                images[:, :, row, column] = pixel[:, :, 0, 0]
                sampler.set(pixel, row, column)
        return images

    @property
    def likelihood_protocol(self) -> str:
        return f"{self.config.bits} bits, not dequantised"

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:  # noqa: ARG002
        x = quantise(batch.images, self.config.bits)
        return self._mixture(self.pixelcnn(x)).log_prob(x).double()
