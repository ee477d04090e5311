"""NVAE as one writes it with the paper at hand: the other side of `systems.py`. Colour images, without flows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NVAE", "log_likelihood", "penalty"]


class Conv(nn.Conv2d):
    """Weight-normalised."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(before, after, size, stride, padding=size // 2, bias=bias)
        self.log_gain = nn.Parameter(torch.zeros(after, 1, 1, 1))

    def normalised(self) -> Tensor:
        norm = (self.weight.square().sum((1, 2, 3), keepdim=True) + 1e-10).sqrt()
        return self.log_gain.exp() * self.weight / norm

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised(), self.bias, self.stride, self.padding)


class BNSwish(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, momentum=0.05)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(x)


class SE(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(c, max(c // 16, 4)), nn.Linear(max(c // 16, 4), c)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class DownSkip(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv(before, after // 4, 1, stride=2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(x)
        parts = (x, x[:, :, 1:, 1:], x[:, :, :, 1:], x[:, :, 1:, :])
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


class UpSkip(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = Conv(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class EncoderCell(nn.Module):
    def __init__(self, before: int, after: int, down: bool = False) -> None:
        super().__init__()
        first = Conv(before, after, 3, stride=2 if down else 1)
        self.branch = nn.Sequential(BNSwish(before), first, BNSwish(after), Conv(after, after, 3))
        self.se, self.skip = SE(after), DownSkip(before, after) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + 0.1 * self.se(self.branch(x))


class DecoderCell(nn.Module):
    """Its input is upsampled first, as in figure 3a."""

    def __init__(self, before: int, after: int, expansion: int = 6, up: bool = False) -> None:
        super().__init__()
        hidden = before * expansion
        self.up = nn.UpsamplingNearest2d(scale_factor=2) if up else nn.Identity()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(before, momentum=0.05),
            nn.Conv2d(before, hidden, 1, bias=False),
            BNSwish(hidden),
            nn.Identity(),
            nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False),
            BNSwish(hidden),
            nn.Conv2d(hidden, after, 1, bias=False),
            nn.BatchNorm2d(after, momentum=0.05),
        )
        self.se, self.skip = SE(after), UpSkip(before, after) if up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + 0.1 * self.se(self.branch(self.up(x)))


def _clamped(x: Tensor) -> Tensor:
    return 5 * torch.tanh(x / 5)


def _normal(mu: Tensor, log_sigma: Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(_clamped(mu), _clamped(log_sigma).exp() + 0.01, validate_args=False)


class Group(nn.Module):
    def __init__(self, c: int, z: int, cells: int, first: bool) -> None:
        super().__init__()
        self.first, self.z = first, z
        if not first:
            self.cells = nn.Sequential(*(DecoderCell(c, c) for _ in range(cells)))
            self.prior = nn.Sequential(nn.ELU(), Conv(c, 2 * z, 1))
            self.from_decoder = Conv(c, c, 1)
        self.posterior, self.combine = Conv(c, 2 * z, 3), Conv(c + z, c, 1)

    def forward(self, s: Tensor, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.first:
            dq = self.posterior(features)
            mu, log_sigma = dq.chunk(2, 1)
            p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
        else:
            s = self.cells(s)
            mu_p, log_sigma_p = self.prior(s).chunk(2, 1)
            d_mu, d_log_sigma = self.posterior(features + self.from_decoder(s)).chunk(2, 1)
            mu, log_sigma, p = mu_p + d_mu, log_sigma_p + d_log_sigma, _normal(mu_p, log_sigma_p)
        q = _normal(mu, log_sigma)
        z = q.loc + q.scale * torch.randn(q.loc.shape, generator=generator)
        kl = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))
        return self.combine(torch.cat([s, z], 1)), kl


class Start(nn.Module):
    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.rand(channels, size, size))


class NVAE(nn.Module):
    """One block that halves the resolution before the first scale; `groups` from the largest scale to the smallest."""

    def __init__(
        self, resolution: int, width: int, groups: tuple[int, ...], z: int, cells: int, process: int, out: int
    ) -> None:
        super().__init__()
        self.scales = groups
        self.stem = Conv(3, width, 3)
        self.preprocess = nn.Sequential(
            *(EncoderCell(width, width) for _ in range(process - 1)), EncoderCell(width, 2 * width, down=True)
        )
        width *= 2
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        for scale, count in enumerate(groups):
            for _ in range(count):
                self.encoder.append(nn.Sequential(*(EncoderCell(width, width) for _ in range(cells))))
            if scale < len(groups) - 1:
                self.downs.append(nn.Sequential(EncoderCell(width, 2 * width, down=True)))
                width *= 2
        self.top = nn.Sequential(nn.ELU(), Conv(width, width, 1), nn.ELU())
        self.start = Start(width, resolution >> len(groups))
        self.groups, self.ups = nn.ModuleList(), nn.ModuleList()
        for scale, count in enumerate(reversed(groups)):
            for i in range(count):
                self.groups.append(Group(width, z, cells, first=scale == 0 and i == 0))
            if scale < len(groups) - 1:
                self.ups.append(nn.Sequential(DecoderCell(width, width // 2, up=True)))
                width //= 2
        self.postprocess = nn.Sequential(
            DecoderCell(width, width // 2, expansion=3, up=True),
            *(DecoderCell(width // 2, width // 2, expansion=3) for _ in range(process - 1)),
        )
        self.image = nn.Sequential(nn.ELU(), Conv(width // 2, out, 3))

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        s, features, at = self.preprocess(self.stem(x)), [], 0
        for scale, count in enumerate(self.scales):
            for _ in range(count):
                s = self.encoder[at](s)
                features.append(s)
                at += 1
            if scale < len(self.scales) - 1:
                s = self.downs[scale](s)
        features[-1] = self.top(features[-1])
        s, kls, at = self.start.value.expand(len(x), -1, -1, -1), [], 0
        for scale, count in enumerate(reversed(self.scales)):
            for _ in range(count):
                s, kl = self.groups[at](s, features[-1 - at], generator)
                kls.append(kl)
                at += 1
            if scale < len(self.scales) - 1:
                s = self.ups[scale](s)
        return self.image(self.postprocess(s)), kls


def log_likelihood(parameters: Tensor, x: Tensor, bits: int = 8) -> Tensor:
    """Discretised mixture of logistics, in the way of PixelCNN++: differences of sigmoids, and cases."""
    n, total, h, w = parameters.shape
    k = total // 10
    logits, rest = parameters[:, :k], parameters[:, k:].view(n, 3, 3 * k, h, w)
    means, log_scales = rest[:, :, :k], rest[:, :, k : 2 * k].clamp(min=-7)
    c = torch.tanh(rest[:, :, 2 * k :])
    x = x.unsqueeze(2)
    mean_g = means[:, 1] + c[:, 0] * x[:, 0]
    mean_b = means[:, 2] + c[:, 1] * x[:, 0] + c[:, 2] * x[:, 1]
    means = torch.stack([means[:, 0], mean_g, mean_b], 1)
    centred, inverse, half = x - means, torch.exp(-log_scales), 1 / (2**bits - 1)
    plus, minus, middle = inverse * (centred + half), inverse * (centred - half), inverse * centred
    inside = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half)
    log_inside = torch.where(inside > 1e-5, inside.clamp(min=1e-10).log(), density)
    log_p = torch.where(x > 0.999, -F.softplus(minus), log_inside)
    log_p = torch.where(x < -0.999, plus - F.softplus(plus), log_p)
    return torch.logsumexp(log_p.sum(1) + F.log_softmax(logits, 1), 1).sum((1, 2))


def penalty(network: nn.Module, vectors: dict[str, Tensor], iterations: int = 4) -> Tensor:
    """Largest singular values of all convolutions by power iteration, and largest gains, one layer after the other."""
    total = 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            W = (layer.normalised() if isinstance(layer, Conv) else layer.weight).flatten(1)
            u = vectors.setdefault(name, torch.randn(len(W)))
            with torch.no_grad():
                for _ in range(iterations):
                    v = F.normalize(W.T @ u, dim=0)
                    u = F.normalize(W @ v, dim=0)
                vectors[name] = u
            total = total + u @ W @ v
        elif isinstance(layer, nn.BatchNorm2d):
            total = total + layer.weight.abs().max()
    return total
