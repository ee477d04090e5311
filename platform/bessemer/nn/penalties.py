"""Penalties on a critic's gradient with respect to its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = ["gradient_penalty", "interpolated_penalty"]


def gradient_penalty(critic: Callable[[Tensor], Tensor], x: Tensor, target: float = 1.0) -> Tensor:
    """E[(‖∇D(x)‖₂ - target)²], a scalar (Gulrajani et al. 2017, arXiv:1704.00028, eq. 3).

    Args:
        critic: x -> scores [N], each a function of its own image alone.
        x: [N, ...] where the gradient is taken.
        target: norm without penalty.
    """
    x = x.detach().requires_grad_()
    scores = critic(x)
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    # The constant keeps the second derivative finite where the gradient vanishes.
    norms = (gradient.float().flatten(1).square().sum(1) + 1e-12).sqrt()
    # The zero term lets parameters that the gradient does not depend on take part, as all workers must.
    return (norms - target).square().mean() + 0 * scores.mean()


def interpolated_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, generator: Generator, target: float = 1.0
) -> Tensor:
    """:func:`gradient_penalty` at a random point between each real image and a generated one (algorithm 1, line 6).

    Args:
        critic: x -> scores [N].
        real, fake: [N, C, H, W].
        generator: source of the points, one number for each pair.
        target: norm without penalty.
    """
    epsilon = torch.rand(len(real), 1, 1, 1, generator=generator, device=generator.device).to(real.dtype)
    return gradient_penalty(critic, torch.lerp(fake, real, epsilon), target)
