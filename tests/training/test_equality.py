"""The heart: our engines compute what a plain PyTorch loop computes, at every stage and number of workers."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 6


def plain_loop(tiny: ModuleType, clip: float | None = None) -> dict[str, Tensor]:
    """Train the same two networks with nothing but torch: whole batch, no slices' machinery, no engine."""
    slices = range(tiny.BATCH // tiny.SLICE)
    g, d = tiny.make_networks()
    draws = tiny.generator("cpu", tiny.SEED, "init")
    with torch.no_grad():
        for p in [*g.parameters(), *d.parameters()]:
            p.copy_(torch.randn(p.shape, generator=draws) * 0.3)
    g_optimizer = torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.0, 0.9))
    d_optimizer = torch.optim.Adam(d.parameters(), lr=3e-3, betas=(0.5, 0.99))
    ema = {k: v.clone() for k, v in g.named_parameters()}
    # sigma_rel -> gamma, and the exact average: weights are constant between updates, so the integral is a sum
    powers = {0.1: 6.937203938, 0.25: 0.719823958}
    wide = {s: {k: torch.zeros_like(v, dtype=torch.float64) for k, v in g.named_parameters()} for s in powers}
    total = ITERATIONS * 2 * tiny.BATCH
    running_mean = torch.zeros(16)

    def hidden(z: Tensor) -> tuple[Tensor, Tensor]:
        """Generator by hand; also the batch mean of the layer before the norm."""
        h = z @ g[0].weight.T
        normed = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
        return torch.tanh(normed) @ g[3].weight.T + g[3].bias, h.mean(0).detach()

    def step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[Tensor]) -> None:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.cat([x.flatten() for x in gradients if x is not None]).norm()
        scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        for p, x in zip(parameters, gradients, strict=True):
            p.grad = torch.zeros_like(p) if x is None else x * scale
        optimizer.step()

    nimg = 0
    for iteration in range(ITERATIONS):
        for repeat in range(2):
            at, losses, means = nimg + repeat * tiny.BATCH, [], []
            for i in slices:
                real = tiny.real_slice(at, i).images.flatten(1)
                fake, mean = hidden(torch.randn(4, 5, generator=tiny.generator("cpu", 7, "discriminator", at, i)))
                losses.append(F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean())
                means.append(mean)
            step(d_optimizer, torch.stack(losses).mean(), list(d.parameters()))
            running_mean = 0.9 * running_mean + 0.1 * torch.stack(means).mean(0)
        if iteration % 2 == 0:
            penalties = []
            for i in slices:
                real = tiny.real_slice(nimg, i).images.flatten(1).requires_grad_()
                (gradient,) = torch.autograd.grad(d(real).sum(), real, create_graph=True)
                penalties.append(tiny.GAMMA / 2 * gradient.square().sum(1).mean())
            step(d_optimizer, torch.stack(penalties).mean(), list(d.parameters()))
        losses, means = [], []
        for i in slices:
            fake, mean = hidden(torch.randn(4, 5, generator=tiny.generator("cpu", 7, "generator", nimg, i)))
            losses.append(F.softplus(-d(fake)).mean())
            means.append(mean)
        step(g_optimizer, torch.stack(losses).mean(), list(g.parameters()))
        running_mean = 0.9 * running_mean + 0.1 * torch.stack(means).mean(0)
        half_life = min(200.0, 0.5 * nimg)
        beta = 0.5 ** (2 * tiny.BATCH / half_life) if half_life else 0.0
        for k, v in g.named_parameters():
            ema[k] = beta * ema[k] + (1 - beta) * v.detach()
            for s, gamma in powers.items():
                share = ((nimg + 2 * tiny.BATCH) / total) ** (gamma + 1) - (nimg / total) ** (gamma + 1)
                wide[s][k] += share * v.detach().double()
        nimg += 2 * tiny.BATCH
    expected = {f"generator.{k}": v.detach() for k, v in g.named_parameters()}
    expected |= {f"discriminator.{k}": v.detach() for k, v in d.named_parameters()}
    expected |= {f"ema.generator.{k}": v for k, v in ema.items()}
    expected |= {f"ema.{s}.generator.{k}": v.float() for s, average in wide.items() for k, v in average.items()}
    return {**expected, "generator.1.mean": running_mean, "ema.generator.1.mean": running_mean}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_equals_a_plain_loop(tiny: ModuleType, launch: object, stage: int, workers: int) -> None:
    expected = plain_loop(tiny)
    for rank, state in enumerate(launch(workers, stage, ITERATIONS)):  # type: ignore[operator]
        for name, value in expected.items():
            error = (state[name] - value).abs().max().item()
            assert error <= 1e-6, f"rank {rank}, {name}: differs by {error}"


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_clipping_equals_a_plain_loop(tiny: ModuleType, launch: object, stage: int) -> None:
    expected, unclipped = plain_loop(tiny, clip=0.05), plain_loop(tiny)
    name = "discriminator.0.weight"
    assert (expected[name] - unclipped[name]).abs().max() > 1e-4, "the bound must matter for this test to say anything"
    for state in launch(2, stage, ITERATIONS, "--clip", 0.05):  # type: ignore[operator]
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
