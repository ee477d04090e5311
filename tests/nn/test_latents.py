import math

import pytest
import torch

from bessemer.nn.latents import normal_latents


def _distribution(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(z.double() / math.sqrt(2)))


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("t", [0.02, 0.5, 1.0, 2.0, 20.0])
def test_truncation_redraws_what_lies_outside(t: float) -> None:
    n = 100_000
    z = normal_latents((n,), _g(), t)
    assert z.dtype == torch.float32
    assert z.abs().max() <= t
    # Kolmogorov-Smirnov against the conditional distribution P(Z <= z | |Z| <= t).
    low, high = _distribution(torch.tensor(-t)), _distribution(torch.tensor(t))
    expected = (_distribution(z.sort().values) - low) / (high - low)
    empirical = (torch.arange(n) + 0.5) / n
    assert (expected - empirical).abs().max() < 1.63 / math.sqrt(n)


def test_small_bounds_give_uniform_latents_and_zero_gives_zeros() -> None:
    z = normal_latents((50_000,), _g(), 1e-3)
    assert z.var().item() == pytest.approx(1e-6 / 3, rel=0.02)
    assert torch.equal(normal_latents((3,), _g(), 0.0), torch.zeros(3))


def test_without_truncation_plain_normal() -> None:
    assert torch.equal(normal_latents((4, 5), _g()), torch.randn(4, 5, generator=_g()))


def test_only_the_generator_counts() -> None:
    state = torch.get_rng_state()
    first = normal_latents((7,), _g(3), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, normal_latents((7,), _g(3), 0.5))
    assert not torch.equal(first, normal_latents((7,), _g(4), 0.5))


def test_equal_draws_keep_their_order_and_meet_without_truncation() -> None:
    """One latent, more and more truncated: what a sheet of truncations shows in a column."""
    z, milder, harder = (normal_latents((10_000,), _g(), t) for t in (None, 1.0, 0.5))
    order = z.argsort()
    assert (milder[order].diff() >= 0).all()
    assert (harder[order].diff() >= 0).all()
    assert (harder.abs() <= milder.abs()).all()
    assert (milder.abs() <= z.abs()).all()
    assert torch.allclose(normal_latents((10_000,), _g(), 20.0), z, rtol=1e-4)
