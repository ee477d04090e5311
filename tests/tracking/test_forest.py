"""Permutation importance against the function's own variances, and against scikit-learn's forest."""

from __future__ import annotations

import numpy as np
import pytest

from bessemer.tracking.forest import permutation_importance


@pytest.mark.parametrize("fields", [2, 6])
def test_importance_is_twice_the_variance_of_each_term(fields: int) -> None:
    """y = 2a + b of uniform a and b: shuffling a costs 2 Var(2a) = 2/3, shuffling b a quarter of that."""
    features = np.random.default_rng(0).random((800, fields))
    rise = permutation_importance(features, 2 * features[:, 0] + features[:, 1]).mean(axis=1)
    assert rise[0] == pytest.approx(2 / 3, rel=0.1)
    assert rise[1] == pytest.approx(1 / 6, rel=0.15)
    assert np.abs(rise[2:]).max(initial=0.0) < 0.01


def test_importance_is_that_of_another_forest() -> None:
    """Interactions, steps and noise, by scikit-learn's random forest on points that it has not seen."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    inspection = pytest.importorskip("sklearn.inspection")
    rng = np.random.default_rng(1)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        x = rng.random((600, 4))
        x[:, 2] = np.floor(3 * x[:, 2]) / 2  # a field with three choices
        return x, np.sin(5 * x[:, 0]) + (x[:, 1] > 0.5) * x[:, 2] + 0.1 * rng.normal(size=len(x))

    (x, y), (x_new, y_new) = draw(), draw()
    forest = ensemble.RandomForestRegressor(64, random_state=0).fit(x, y)
    known = inspection.permutation_importance(
        forest, x_new, y_new, n_repeats=8, random_state=0, scoring="neg_mean_squared_error"
    ).importances_mean
    ours = permutation_importance(x, y).mean(axis=1)
    assert ours / ours.sum() == pytest.approx(known / known.sum(), abs=0.05)


def test_noise_matters_to_no_field() -> None:
    """Judged by points that they have seen, trees would find noise important: that is why they are not."""
    rng = np.random.default_rng(2)
    rise = permutation_importance(rng.random((40, 3)), rng.normal(size=40))
    assert rise.mean(axis=1).max() < 0.3  # of a variance of 1


def test_the_same_seed_says_the_same() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.random((30, 2)), rng.random(30)
    assert np.array_equal(permutation_importance(x, y), permutation_importance(x, y))
    assert not np.array_equal(permutation_importance(x, y), permutation_importance(x, y, seed=1))


def test_equal_points_and_equal_values_are_no_problem() -> None:
    assert not permutation_importance(np.zeros((6, 2)), np.arange(6.0)).any()
    assert not permutation_importance(np.random.default_rng(4).random((6, 2)), np.ones(6)).any()
