"""Distributions of images: exact probabilities of discrete pixels, and draws from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["Bernoulli", "ImageDistribution", "LogisticMixture", "quantise"]

_LEAST_LOG_SCALE = -7.0  # PixelCNN++; a thousandth of the range: far below half a step of 8 bits


def quantise(images: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` of 8-bit pixels: [-1, 1] -> the levels -1, ..., 1 at equal distances, 2^bits of them."""
    pixels = images.add(1).mul(127.5).round_()
    return torch.div(pixels, 1 << (8 - bits), rounding_mode="floor") * (2 / ((1 << bits) - 1)) - 1


def _uniform(shape: torch.Size, generator: Generator, dtype: torch.dtype) -> Tensor:
    """U(0, 1) without the ends."""
    u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return u.clamp_(1e-12, 1 - 1e-12).to(torch.promote_types(dtype, torch.float32))


def _clamped_mean(mean: Tensor, scale: Tensor) -> Tensor:
    """E[min(max(x, -1), 1)] of logistic x: -1 + ∫ P(x > t) dt, from -1 to 1."""
    narrow = scale.clamp(max=8)
    exact = narrow * (F.softplus((mean + 1) / narrow) - F.softplus((mean - 1) / narrow)) - 1
    # In broad ones this would cancel; to them Simpson's rule is exact but for 1e-6.
    low, middle, high = (torch.tanh((mean + t) / (2 * scale)) for t in (-1, 0, 1))
    return torch.where(scale < 8, exact, (low + 4 * middle + high) / 6)


class ImageDistribution(Protocol):
    """p(x) over images [N, C, H, W]."""

    def log_prob(self, images: Tensor) -> Tensor:
        """Log probability of each image, [N] in nats."""

    def sample(self, generator: Generator) -> Tensor:
        """One image from each distribution, [N, C, H, W] in [-1, 1]."""

    def mean(self) -> Tensor:
        """Expected images, [N, C, H, W] in [-1, 1]."""


class Bernoulli:
    """Independent black (-1) and white (1) pixels.

    Args:
        logits: log odds of white, [N, C, H, W].
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def log_prob(self, images: Tensor) -> Tensor:
        white = (images > 0).to(self.logits.dtype)
        return -F.binary_cross_entropy_with_logits(self.logits, white, reduction="none").sum((1, 2, 3))

    def sample(self, generator: Generator) -> Tensor:
        white = _uniform(self.logits.shape, generator, torch.float32) < torch.sigmoid(self.logits)
        return 2 * white.float() - 1

    def mean(self) -> Tensor:
        return 2 * torch.sigmoid(self.logits) - 1


class LogisticMixture:
    """Discretised mixture of logistics (PixelCNN++, Salimans et al. 2017, arXiv:1701.05517, sections 2.1 and 2.2).

    A pixel takes the levels -1, ..., 1 at equal distances. Its probability is the mass of a mixture of logistic
    distributions within half a step, and beyond at the two ends, so the probabilities of all levels sum to 1. The mean
    of green depends on red, that of blue on red and green.

    Args:
        parameters: [N, :meth:`parameters_per_pixel`, H, W]; per pixel the logits of the components, then for each
            colour means, log scales and, with three colours, coefficients before their tanh.
        channels: 1 or 3 colours.
        bits: 2^bits levels.
    """

    def __init__(self, parameters: Tensor, *, channels: int, bits: int = 8) -> None:
        n, total, h, w = parameters.shape
        kinds = 3 if channels == 3 else 2
        k = total // (1 + kinds * channels)
        assert total == self.parameters_per_pixel(channels, k)
        parameters = parameters.float() if parameters.dtype in (torch.float16, torch.bfloat16) else parameters
        self.logits = parameters[:, :k]
        """[N, K, H, W]"""
        own = parameters[:, k:].view(n, channels, kinds * k, h, w)
        self.means, self.log_scales = own[:, :, :k], own[:, :, k : 2 * k].clamp_min(_LEAST_LOG_SCALE)
        """[N, C, K, H, W]"""
        self.coefficients = torch.tanh(own[:, :, 2 * k :])
        """[N, 3, K, H, W]: of red in green, of red in blue, of green in blue."""
        self.channels, self.steps = channels, (1 << bits) - 1

    @staticmethod
    def parameters_per_pixel(channels: int, components: int) -> int:
        """Number of parameters per pixel: 10 per component for three colours, 3 for one."""
        return components * (10 if channels == 3 else 1 + 2 * channels)

    def _means(self, x: Tensor) -> Tensor:
        """Means of all colours [N, C, K, H, W] given the colours before them, x [N, C, 1, H, W] (eq. 3)."""
        if self.channels != 3:
            return self.means
        red, green, c = x[:, 0], x[:, 1], self.coefficients
        shifts = [torch.zeros_like(c[:, 0]), c[:, 0] * red, c[:, 1] * red + c[:, 2] * green]
        return self.means + torch.stack(shifts, 1)

    def log_prob(self, images: Tensor) -> Tensor:
        x = images.to(self.means.dtype).unsqueeze(2)
        rate = torch.exp(-self.log_scales)
        centred = (x - self._means(x)) * rate
        half = rate / self.steps  # half a step over the scale
        above, below = F.logsigmoid(centred + half), F.logsigmoid(half - centred)
        # σ(a) - σ(b) = σ(a)·σ(-b)·(1 - e^(b - a)): nothing cancels, however far out the pixel lies.
        inside = above + below + torch.log(-torch.expm1(-2 * half))
        edge = 1 - 1 / self.steps  # half a step from the ends
        masses = torch.where(x < -edge, above, torch.where(x > edge, below, inside))
        return torch.logsumexp(masses.sum(1) + F.log_softmax(self.logits, 1), 1).sum((1, 2))

    def sample(self, generator: Generator) -> Tensor:
        u = _uniform(self.logits.shape, generator, self.logits.dtype)
        chosen = (self.logits - torch.log(-torch.log(u))).argmax(1)[:, None, None]  # the Gumbel-max trick

        def of_chosen(values: Tensor) -> Tensor:
            return values.gather(2, chosen.expand(-1, values.shape[1], -1, -1, -1)).squeeze(2)

        means, scales = of_chosen(self.means), of_chosen(self.log_scales).exp()
        coefficients = of_chosen(self.coefficients) if self.channels == 3 else None
        u = _uniform(means.shape, generator, means.dtype)
        noise = scales * (u.log() - torch.log1p(-u))
        return self._by_colour(means, coefficients, lambda i, mean: self._level(mean + noise[:, i]))

    def mean(self) -> Tensor:
        """Expected images, up to the rounding to levels: exact for grey and red.

        Colours move the next one as their own mean within each component, where they really move it as they were drawn.
        What a component puts beyond the ends lies on them, so a mean beyond an end moves the next colour no further.
        """
        scales = self.log_scales.exp()
        of_components = self._by_colour(
            self.means,
            self.coefficients if self.channels == 3 else None,
            lambda i, mean: _clamped_mean(mean, scales[:, i]),
        )
        return (of_components * torch.softmax(self.logits, 1).unsqueeze(1)).sum(2).clamp(-1, 1)

    def _level(self, x: Tensor) -> Tensor:
        """The level in whose interval x lies."""
        return x.clamp(-1, 1).add(1).mul(self.steps / 2).round() * (2 / self.steps) - 1

    @staticmethod
    def _by_colour(means: Tensor, coefficients: Tensor | None, value: Callable[[int, Tensor], Tensor]) -> Tensor:
        """One colour after the other; means and coefficients [N, C, ...]."""
        out: list[Tensor] = []
        for i in range(means.shape[1]):
            mean = means[:, i]
            if coefficients is not None:
                for j, before in enumerate(out):
                    mean = mean + coefficients[:, j if i == 1 else 1 + j] * before
            out.append(value(i, mean))
        return torch.stack(out, 1)
