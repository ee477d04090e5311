"""StyleGAN2 as one writes it with the paper at hand: the other side of `systems.py`. No classes, no augmentation."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Discriminator", "Generator", "Training"]


def _taps() -> Tensor:
    f = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return f[:, None] * f / 64


def resample(x: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0), gain: float = 1) -> Tensor:
    """Insert zeros, pad, filter every channel, drop pixels."""
    n, c, h, w = x.shape
    if up > 1:
        x = x.view(n, c, h, 1, w, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    x = F.pad(x, (*pad, *pad))
    kernel = (_taps() * gain).expand(c, 1, 4, 4)
    return F.conv2d(x, kernel, groups=c)[:, :, ::down, ::down]


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Linear(nn.Module):
    def __init__(self, before: int, after: int, bias: float = 0.0, activate: bool = False, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before) / rate)
        self.bias = nn.Parameter(torch.full((after,), bias / rate))
        self.activate, self.rate = activate, rate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.rate / math.sqrt(self.weight.shape[1])
        y = F.linear(x, self.weight * scale, self.bias * self.rate)
        return leaky(y) if self.activate else y


class Conv(nn.Module):
    def __init__(self, before: int, after: int, size: int = 3, bias: bool = True, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, size, size))
        self.bias = nn.Parameter(torch.zeros(after)) if bias else None
        self.down, self.scale = down, 1 / math.sqrt(before * size**2)

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape[-1]
        weight = self.weight * self.scale
        if self.down:
            p = size // 2 + 1
            y = F.conv2d(resample(x, pad=(p, p)), weight, stride=2)
        else:
            y = F.conv2d(x, weight, padding=size // 2)
        return y if self.bias is None else leaky(y + self.bias[:, None, None])


class ModulatedConv(nn.Module):
    """Weights of their own for each image, convolved in as many groups as there are images."""

    def __init__(self, before: int, after: int, w: int, size: int = 3, up: bool = False, colour: bool = False) -> None:
        super().__init__()
        self.affine = Linear(w, before, bias=1.0)
        self.weight = nn.Parameter(torch.randn(after, before, size, size))
        self.bias = nn.Parameter(torch.zeros(after))
        self.noise_strength = None if colour else nn.Parameter(torch.zeros(1))
        self.up, self.colour, self.scale = up, colour, 1 / math.sqrt(before * size**2)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        n, i, height, width = x.shape
        o, _, k, _ = self.weight.shape
        weight = self.weight * self.affine(w)[:, None, :, None, None]
        if self.colour:
            weight = weight * self.scale
        else:
            weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, n * i, height, width)
        if self.up:
            weight = weight.transpose(1, 2).flip(3, 4).reshape(n * i, o, k, k)
            x = resample(F.conv_transpose2d(x, weight, stride=2, groups=n), pad=(1, 1), gain=4)
        else:
            x = F.conv2d(x, weight.reshape(n * o, i, k, k), padding=k // 2, groups=n)
        x = x.view(n, o, *x.shape[2:])
        if self.colour:
            return x + self.bias[:, None, None]
        return leaky(x + noise * self.noise_strength + self.bias[:, None, None])


class SynthesisBlock(nn.Module):
    def __init__(self, before: int, after: int, w: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ModulatedConv(before, after, w, up=True)] if before else [])
        self.convs.append(ModulatedConv(after, after, w))
        self.to_rgb = ModulatedConv(after, 3, w, 1, colour=True)


class Synthesis(nn.Module):
    def __init__(self, widths: list[int], w: int) -> None:
        super().__init__()
        self.const = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.blocks = nn.ModuleList(SynthesisBlock(a, b, w) for a, b in pairwise([0, *widths]))
        self.sizes = [4 << i for i in range(len(widths)) for _ in range(2 if i else 1)]

    def forward(self, ws: Tensor, noise: list[Tensor]) -> Tensor:
        x, image, at = self.const.expand(len(ws), -1, -1, -1), None, 0
        for block in self.blocks:
            for conv in block.convs:
                x = conv(x, ws[:, at], noise[at])
                at += 1
            colours = block.to_rgb(x, ws[:, at])
            image = colours if image is None else resample(image, up=2, pad=(2, 1), gain=4) + colours
        return image


class Mapping(nn.Module):
    def __init__(self, z: int, w: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Linear(w if i else z, w, activate=True, rate=0.01) for i in range(layers)))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())


class Generator(nn.Module):
    def __init__(self, widths: list[int], z: int, w: int, layers: int) -> None:
        super().__init__()
        self.mapping, self.synthesis = Mapping(z, w, layers), Synthesis(widths, w)


class DiscriminatorBlock(nn.Module):
    def __init__(self, before: int, after: int, first: bool) -> None:
        super().__init__()
        self.from_rgb = Conv(3, before, 1) if first else None
        self.conv1, self.conv2 = Conv(before, before), Conv(before, after, down=True)
        self.skip = Conv(before, after, 1, bias=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.from_rgb is None else self.from_rgb(x)
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class Discriminator(nn.Module):
    def __init__(self, widths: list[int], group: int) -> None:
        super().__init__()
        top = widths[0]
        pairs = list(pairwise(widths))[::-1]
        self.blocks = nn.ModuleList(DiscriminatorBlock(b, a, i == 0) for i, (a, b) in enumerate(pairs))
        self.conv, self.linear = Conv(top + 1, top), Linear(top * 16, top, activate=True)
        self.out, self.group = Linear(top, 1), group

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        n, _, h, w = x.shape
        groups = x.view(min(self.group, n), -1, *x.shape[1:])
        deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        x = torch.cat([x, deviation.repeat(min(self.group, n)).view(n, 1, 1, 1).expand(n, 1, h, w)], 1)
        return self.out(self.linear(self.conv(x).flatten(1)))[:, 0]


class Training:
    """All four updates, each on its own batch of latents."""

    def __init__(self, G: Generator, D: Discriminator, z: int, mixing: float, gamma: float) -> None:
        self.G, self.D, self.z, self.mixing, self.gamma = G, D, z, mixing, gamma
        self.path = torch.zeros(())
        self.optimizers = [torch.optim.Adam(m.parameters(), lr=0.002, betas=(0.0, 0.99)) for m in (G, D)]

    def _generate(self, n: int) -> tuple[Tensor, Tensor]:
        sizes = self.G.synthesis.sizes
        ws = self.G.mapping(torch.randn(n, self.z))[:, None].repeat(1, len(sizes) + 1, 1)
        second = self.G.mapping(torch.randn(n, self.z))
        cut = torch.where(torch.rand(n) < self.mixing, torch.randint(1, len(sizes) + 1, (n,)), len(sizes) + 1)
        ws = torch.where((torch.arange(len(sizes) + 1) < cut[:, None])[:, :, None], ws, second[:, None])
        return self.G.synthesis(ws, [torch.randn(n, 1, r, r) for r in sizes]), ws

    def _step(self, index: int, loss: Tensor) -> None:
        self.optimizers[index].zero_grad()
        loss.backward()
        self.optimizers[index].step()

    def _train(self, G: bool) -> None:
        self.G.requires_grad_(G)
        self.D.requires_grad_(not G)

    def generator(self, images: Tensor) -> None:
        self._train(True)
        self._step(0, F.softplus(-self.D(self._generate(len(images))[0])).mean())

    def path_length(self, images: Tensor) -> None:
        self._train(True)
        made, ws = self._generate(len(images) // 2)
        y = torch.randn_like(made) / math.sqrt(made.shape[2] * made.shape[3])
        (gradient,) = torch.autograd.grad((made * y).sum(), ws, create_graph=True)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        self.path = self.path.lerp(lengths.mean().detach(), 0.01)
        self._step(0, 4 * 2 * (lengths - self.path).square().mean() + 0 * made.mean())

    def discriminator(self, images: Tensor) -> None:
        self._train(False)
        with torch.no_grad():
            fake, _ = self._generate(len(images))
        self._step(1, F.softplus(self.D(fake)).mean() + F.softplus(-self.D(images)).mean())

    def r1(self, images: Tensor) -> None:
        self._train(False)
        x = images.detach().requires_grad_()
        scores = self.D(x)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        self._step(1, 16 * self.gamma / 2 * gradient.square().sum((1, 2, 3)).mean() + 0 * scores.mean())
