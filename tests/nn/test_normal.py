import math

import pytest
import torch

from bessemer.nn.normal import Normal, residual, soft_clamp

F64 = torch.float64


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kl_of_residual_normals_against_monte_carlo() -> None:
    prior, change = (torch.randn(3, 8, 1, 1, generator=_g(i), dtype=F64) for i in (1, 2))
    q, p = residual(prior, change), Normal.bounded(*prior.chunk(2, 1))
    draws = 200_000
    noise = torch.randn(draws, *q.mu.shape, generator=_g(3), dtype=F64)
    z = q.mu + q.sigma * noise
    ratio = q.log_prob(z) - p.log_prob(z)
    error = ratio.std(0) / math.sqrt(draws)
    kl = q.kl(p)
    assert (kl > 0.01).any()
    assert ((ratio.mean(0) - kl).abs() < 5 * error + 1e-12).all()


def test_densities_and_kl_are_torchs() -> None:
    q, p = (Normal.bounded(*torch.randn(2, 5, generator=_g(i), dtype=F64)) for i in (0, 1))
    theirs = [torch.distributions.Normal(n.mu, n.sigma) for n in (q, p)]
    z = torch.randn(5, generator=_g(2), dtype=F64)
    torch.testing.assert_close(q.log_prob(z), theirs[0].log_prob(z))
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(*theirs))


def test_a_posterior_that_changes_nothing_is_the_prior() -> None:
    prior = torch.randn(2, 6, 2, 2, generator=_g(), dtype=F64)
    q, p = residual(prior, torch.zeros_like(prior)), Normal.bounded(*prior.chunk(2, 1))
    assert not q.kl(p).any()
    shifted = residual(prior, torch.cat([torch.full((2, 3, 2, 2), 0.3), torch.zeros(2, 3, 2, 2)], 1))
    torch.testing.assert_close(shifted.mu, 5 * torch.tanh((prior[:, :3] + 0.3) / 5))
    torch.testing.assert_close(shifted.sigma, p.sigma)


def test_parameters_are_bounded_whatever_comes_in() -> None:
    extreme = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30])
    n = Normal.bounded(extreme, extreme)
    assert n.mu.abs().max() <= 5
    assert n.sigma.min() >= 1e-2
    assert n.sigma.max() <= math.exp(5) + 0.02
    worst = n.kl(Normal.bounded(-extreme, -extreme))
    assert worst.isfinite().all()
    torch.testing.assert_close(soft_clamp(torch.tensor(1e-3)), torch.tensor(1e-3))


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_temperature_scales_sigma(temperature: float) -> None:
    mu, log_sigma = torch.randn(2, 1000, generator=_g())
    hot, cold = Normal.bounded(mu, log_sigma), Normal.bounded(mu, log_sigma, temperature)
    torch.testing.assert_close(cold.sigma, temperature * hot.sigma)
    away = [n.sample(_g(1)) - n.mu for n in (hot, cold)]
    torch.testing.assert_close(away[1], temperature * away[0])


def test_half_precision_parameters_make_full_precision_normals() -> None:
    assert (
        Normal.bounded(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)).mu.dtype
        == torch.float32
    )
