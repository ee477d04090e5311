"""Power-function averages against their definition, and the reconstruction against the exact average."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.training.power_function import Profiles, combine, exponent, power_beta

NIMG, BATCH = 4096, 8


def trajectory(seed: int, drift: float = 5.0) -> np.ndarray:
    """Weights [NIMG / BATCH, 6] as a run might move them: fast at first, a random walk on an offset later."""
    steps = NIMG // BATCH
    noise = np.random.default_rng(seed).normal(size=(steps, 6)).cumsum(0) * 0.05
    return noise + drift + 3 * np.exp(-np.arange(steps) / 30)[:, None]


def exact(weights: np.ndarray, sigma_rel: float, nimg: int) -> np.ndarray:
    """The integral of the profile times the weights, in float64: weights are constant during each batch."""
    edges = np.arange(0, nimg + BATCH, BATCH) / nimg
    masses = np.diff(edges ** (exponent(sigma_rel) + 1))
    return masses @ weights[: nimg // BATCH]


def profiles(sigma_rels: list[float], times: list[int]) -> Profiles:
    pairs = [(float(t), exponent(s)) for s in sigma_rels for t in times]
    return Profiles(*(np.array(column) for column in zip(*pairs, strict=True)))


@given(sigma_rel=st.floats(0.01, 12**-0.5))
def test_exponent_has_the_width(sigma_rel: float) -> None:
    gamma = exponent(sigma_rel)
    assert gamma > -1e-6
    u = (np.arange(200_000) + 0.5) / 200_000  # τ/t by the inverse of its distribution function
    assert (u ** (1 / (gamma + 1))).std() == pytest.approx(sigma_rel, rel=2e-3)


def test_known_exponents() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)  # γ of section 3's two stored averages
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(12**-0.5) == pytest.approx(0, abs=1e-9)  # the mean of all weights


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_updates_compute_the_integral(sigma_rel: float) -> None:
    weights, gamma = trajectory(0), exponent(sigma_rel)
    average = np.full(6, 1e6)  # whatever was there before the first image is gone after it
    for step, value in enumerate(weights):
        beta = power_beta(gamma, BATCH, step * BATCH)
        average = beta * average + (1 - beta) * value
    np.testing.assert_allclose(average, exact(weights, sigma_rel, NIMG), rtol=1e-12)


@given(sigma_rel=st.floats(0.02, 0.28), parts=st.lists(st.integers(1, 500), min_size=1, max_size=6))
def test_batches_of_constant_weights_may_be_joined(sigma_rel: float, parts: list[int]) -> None:
    gamma, nimg, together = exponent(sigma_rel), 1000, 1.0
    for images in parts:
        together *= power_beta(gamma, images, nimg)
        nimg += images
    assert together == pytest.approx(power_beta(gamma, sum(parts), 1000), rel=1e-9)


def test_inner_products_are_integrals() -> None:
    some = profiles([0.03, 0.1, 0.25], [500, 1000, 4000])
    grid = (np.arange(400_000) + 0.5) / 100
    p = [np.where(grid <= t, (g + 1) * (grid / t) ** g / t, 0) for t, g in zip(some.times, some.gammas, strict=True)]
    numeric = np.array([[(a * b).sum() / 100 for b in p] for a in p])
    np.testing.assert_allclose(some.inner(some), numeric, rtol=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.13, 0.2])
def test_reconstruction_comes_close_and_closer(sigma_rel: float) -> None:
    """Against the average computed from all weights: the error is small and falls with the number stored."""
    weights = trajectory(1)
    wanted, errors, residuals = exact(weights, sigma_rel, NIMG), [], []
    nearest = min(np.abs(exact(weights, s, NIMG) - wanted).max() for s in (0.05, 0.1))
    for count in (4, 8, 16, 32, 64):
        times = [NIMG // count * (i + 1) for i in range(count)]
        stored = np.stack([exact(weights, s, t) for s in (0.05, 0.1) for t in times]).astype(np.float32)
        found = combine(profiles([0.05, 0.1], times), profiles([sigma_rel], [NIMG]))
        errors.append(float(np.abs(found.weights @ stored - wanted).max()))
        residuals.append(found.residual)
        assert found.weights.sum() == pytest.approx(1, abs=1e-9)
    assert residuals == sorted(residuals, reverse=True)
    assert all(later < 0.6 * sooner for sooner, later in pairwise(errors)), errors
    assert errors[-1] < 1e-3 * nearest


def test_what_is_stored_is_found_again() -> None:
    stored = profiles([0.05, 0.1], [1000, 2000, 3000])
    found = combine(stored, profiles([0.1], [3000]))
    np.testing.assert_allclose(found.weights, [0, 0, 0, 0, 0, 1], atol=1e-8)
    assert found.residual < 1e-6


def test_what_never_moved_is_reproduced_by_few() -> None:
    """Also where the residual is large: weights of sum 1."""
    found = combine(profiles([0.05], [500, 1000]), profiles([0.2], [1000]))
    assert found.residual > 0.2
    assert found.weights @ np.full(2, 7.25) == pytest.approx(7.25, rel=1e-12)


def test_long_runs_stay_in_range() -> None:
    times = [10**9 * (i + 1) for i in range(40)]
    found = combine(profiles([0.01, 0.05], times), profiles([0.02], [times[-1]]))
    assert np.isfinite(found.weights).all()
    assert found.residual < 0.2
