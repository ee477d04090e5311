"""BigGAN as one writes it with the paper at hand: the other side of `systems.py`. With classes and shared embedding."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Discriminator", "Generator", "step"]


class _Spectral(nn.Module):
    """Power iteration in every forward pass of training, as in Miyato's algorithm 1."""

    def normalised(self) -> Tensor:
        W = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(W.T @ self.u, dim=0)
            u = F.normalize(W @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        return self.weight / (u @ W @ v)


class Conv(_Spectral, nn.Conv2d):
    def __init__(self, before: int, after: int, size: int = 3, bias: bool = True) -> None:
        super().__init__(before, after, size, padding=size // 2, bias=bias)
        self.register_buffer("u", torch.randn(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised(), self.bias, padding=self.padding)


class Linear(_Spectral, nn.Linear):
    def __init__(self, before: int, after: int, bias: bool = True) -> None:
        super().__init__(before, after, bias)
        self.register_buffer("u", torch.randn(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class Embedding(_Spectral, nn.Embedding):
    def __init__(self, entries: int, features: int) -> None:
        super().__init__(entries, features)
        self.register_buffer("u", torch.randn(entries))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.normalised())


class ConditionalNorm(nn.Module):
    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = Linear(condition, channels, bias=False), Linear(condition, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        return self.norm(x) * gain[:, :, None, None] + bias[:, :, None, None]


class Attention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.theta, self.phi = Conv(c, c // 8, 1, bias=False), Conv(c, c // 8, 1, bias=False)
        self.g, self.o = Conv(c, c // 2, 1, bias=False), Conv(c // 2, c, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        theta = self.theta(x).view(n, c // 8, h * w)
        phi = F.max_pool2d(self.phi(x), 2).view(n, c // 8, h * w // 4)
        g = F.max_pool2d(self.g(x), 2).view(n, c // 2, h * w // 4)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        o = self.o(torch.bmm(g, beta.transpose(1, 2)).view(n, c // 2, h, w))
        return self.gamma * o + x


class GBlock(nn.Module):
    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(before, condition), ConditionalNorm(after, condition)
        self.conv1, self.conv2, self.shortcut = Conv(before, after), Conv(after, after), Conv(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), condition)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2))


class Generator(nn.Module):
    def __init__(self, widths: list[int], z: int, shared: int, classes: int, attend_at: set[int]) -> None:
        super().__init__()
        self.chunk = z // len(widths)
        self.shared = nn.Embedding(classes, shared)
        self.linear = Linear(self.chunk, widths[0] * 16)
        pairs = list(pairwise(widths))
        self.blocks = nn.ModuleList(GBlock(a, b, shared + self.chunk) for a, b in pairs)
        self.attention = nn.ModuleDict({str(i): Attention(b) for i, (_, b) in enumerate(pairs) if 8 << i in attend_at})
        self.norm, self.conv = nn.BatchNorm2d(widths[-1]), Conv(widths[-1], 3)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        first, *rest = z.split(self.chunk, 1)
        e = self.shared(y)
        h = self.linear(first)
        h = h.view(len(h), -1, 4, 4)
        for i, (block, chunk) in enumerate(zip(self.blocks, rest, strict=True)):
            h = block(h, torch.cat([e, chunk], 1))
            if str(i) in self.attention:
                h = self.attention[str(i)](h)
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class DBlock(nn.Module):
    def __init__(self, before: int, after: int, first: bool, down: bool) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1, self.conv2 = Conv(before, after), Conv(after, after)
        self.shortcut = Conv(before, after, 1) if down or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        x = x if self.shortcut is None else self.shortcut(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2) if self.down else h + x


class Discriminator(nn.Module):
    """At 32 pixels: two of four blocks halve the size, and attention follows all of them."""

    def __init__(self, widths: list[int], classes: int, attend: bool) -> None:
        super().__init__()
        pairs = list(pairwise([3, *widths]))
        self.blocks = nn.ModuleList(DBlock(a, b, i == 0, i < 2) for i, (a, b) in enumerate(pairs))
        self.attention = nn.ModuleDict({str(i): Attention(b) for i, (_, b) in enumerate(pairs) if attend})
        self.linear, self.embed = Linear(widths[-1], 1), Embedding(classes, widths[-1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        h = F.relu(x).sum((2, 3))
        return self.linear(h)[:, 0] + (self.embed(y) * h).sum(1)


def _orthogonal(generator: Generator) -> Tensor:
    """Equation 3."""
    total = 0
    for name, p in generator.named_parameters():
        if p.ndim > 1 and not name.startswith("shared"):
            W = p.flatten(1)
            total = total + ((W @ W.T) * (1 - torch.eye(len(W)))).square().sum()
    return total


def step(
    G: Generator,
    D: Discriminator,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    beta: float,
    z_dim: int,
    classes: int,
) -> None:
    """One discriminator and one generator step."""
    n = len(images)
    D.requires_grad_(True)
    z, y = torch.randn(n, z_dim), torch.randint(classes, (n,))
    with torch.no_grad():
        fake = G(z, y)
    scores = D(torch.cat([fake, images]), torch.cat([y, labels]))
    loss = F.relu(1 + scores[:n]).mean() + F.relu(1 - scores[n:]).mean()
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
    D.requires_grad_(False)
    z, y = torch.randn(n, z_dim), torch.randint(classes, (n,))
    loss = -D(G(z, y), y).mean()
    if beta:
        loss = loss + beta * _orthogonal(G)
    optimizers[0].zero_grad()
    loss.backward()
    optimizers[0].step()
