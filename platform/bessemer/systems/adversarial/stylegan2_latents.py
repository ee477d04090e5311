"""What people do with a trained StyleGAN2: mix styles, and find the latent of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bessemer.nn.latents import normal_latents
from bessemer.nn.modes import evaluation_mode
from bessemer.systems.adversarial.stylegan2 import StyleGAN2

__all__ = ["Projection", "mix_styles", "noise_correlation", "project", "pyramid_distance"]

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of two batches [N, C, H, W] in [-1, 1]: a scalar, differentiable in the first."""


@torch.no_grad()
def mix_styles(
    system: StyleGAN2,
    rows: int,
    columns: int,
    layers: Sequence[int],
    generator: Generator,
    *,
    label: int = 0,
    truncation: float | None = None,
) -> Tensor:
    """Images that take the styles of some layers from another image (StyleGAN, Karras et al. 2019, figure 3).

    Args:
        system: its generator is used as it is, in evaluation mode.
        rows: images that are changed.
        columns: images that the styles come from.
        layers: indices of the w that change: 0 to 3 for pose and shape, the last ones for colours.
        generator: source of latents and noise, on the networks' device.
        label: class of all images.
        truncation: ψ.

    Returns:
        [rows + 1, columns + 1, C, H, W] in [-1, 1]: the sources above, the changed images at the left, grey in the
        corner. All have the same noise.
    """
    G, count = system.generator, rows + columns
    labels = torch.full((count,), label, device=generator.device)
    with evaluation_mode([G]):
        w = G.mapping(normal_latents((count, system.config.latent_dim), generator), labels)
        ws = G.broadcast(w, truncation)
        noise = G.synthesis.draw_noise(1, generator)
        changed = ws[:rows, None].repeat(1, columns, 1, 1)
        changed[:, :, list(layers)] = ws[None, rows:][:, :, list(layers)]
        images = G.synthesis(torch.cat([ws, changed.flatten(0, 1)]), noise).clamp(-1, 1).float()
    left, above, mixed = images[:rows], images[rows:count], images[count:].unflatten(0, (rows, columns))
    top = torch.cat([torch.zeros_like(above[:1]), above])
    return torch.cat([top[None], torch.cat([left[:, None], mixed], 1)])


def pyramid_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean square difference, averaged over the resolutions from the images' own down to 4 × 4."""
    terms = []
    while min(a.shape[2:]) >= 4:
        terms.append(F.mse_loss(a, b))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return torch.stack(terms).mean()


def noise_correlation(noise: Sequence[Tensor]) -> Tensor:
    """How much neighbouring values of noise maps [1, 1, R, R] resemble each other, at all scales down to 8 × 8.

    The regulariser of StyleGAN2, appendix D: without it the image would be hidden in the noise.
    """
    total = noise[0].new_zeros(())
    for n in noise:
        while True:
            total = total + sum((n * n.roll(1, dim)).mean().square() for dim in (2, 3))
            if n.shape[2] <= 8:
                break
            n = 2 * F.avg_pool2d(n, 2)  # keeps the variance of white noise
    return total


@dataclass(frozen=True)
class Projection:
    """Where an image lies in the space of a generator."""

    w: Tensor
    """[w_dim]."""
    noise: list[Tensor]
    """[1, 1, R, R] for each convolution."""
    image: Tensor
    """[C, H, W] in [-1, 1]: what the generator makes of both."""
    distance: float
    """Of that image from the target."""
    start: float
    """Distance of the image of the average w."""


def project(
    system: StyleGAN2,
    target: Tensor,
    generator: Generator,
    *,
    label: int = 0,
    steps: int = 1000,
    distance: Distance = pyramid_distance,
    lr: float = 0.1,
    noise_weight: float = 1e5,
    draws: int = 10_000,
) -> Projection:
    """Find the w and the noise whose image is nearest to `target` (StyleGAN2, appendix D).

    Args:
        system: its generator is used as it is, in evaluation mode; nothing of it changes.
        target: [C, H, W] in [-1, 1].
        generator: source of randomness, on the networks' device.
        label: class of the image.
        steps: of Adam.
        distance: the paper takes LPIPS on VGG16, which must be handed in; by default pixels at many scales.
        lr: largest learning rate.
        noise_weight: of :func:`noise_correlation`.
        draws: latents from which the average w and its spread are taken.
    """
    G = system.generator
    with evaluation_mode([G]):
        with torch.no_grad():
            z = normal_latents((draws, system.config.latent_dim), generator)
            some = G.mapping(z, torch.full((draws,), label, device=generator.device))
            mean = some.mean(0)
            spread = (some - mean).square().sum(1).mean().sqrt()  # σ_w
        w = mean.clone().requires_grad_()
        noise = [n.requires_grad_() for n in G.synthesis.draw_noise(1, generator)]

        def image(w: Tensor) -> Tensor:
            made: Tensor = G.synthesis(G.broadcast(w[None]), noise)
            return made

        with torch.no_grad():
            start = distance(image(w), target[None]).item()
        optimizer = torch.optim.Adam([w, *noise], lr=lr, betas=(0.9, 0.999))
        for step in range(steps):
            t = step / steps
            for group in optimizer.param_groups:
                group["lr"] = lr * _ramp(t)
            strength = 0.05 * spread * max(0.0, 1 - t / 0.75) ** 2
            moved = w + strength * torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)
            loss = distance(image(moved), target[None]) + noise_weight * noise_correlation(noise)
            for leaf, gradient in zip([w, *noise], torch.autograd.grad(loss, [w, *noise]), strict=True):
                leaf.grad = gradient
            optimizer.step()
            with torch.no_grad():
                for n in noise:
                    n.sub_(n.mean()).mul_(n.square().mean().rsqrt())
        with torch.no_grad():
            made = image(w)
            found = distance(made, target[None]).item()
    return Projection(w.detach(), [n.detach() for n in noise], made[0].clamp(-1, 1), found, start)


def _ramp(t: float) -> float:
    """Learning rate at the share t of the steps: up in the first twentieth, down along a cosine in the last quarter."""
    return min(1.0, t / 0.05) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25)))
