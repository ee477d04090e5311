import sys

import numpy as np
import pytest
from scipy import linalg

from bessemer.errors import EvaluationError
from bessemer.evaluation import metrics
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.metrics import (
    frechet_distance,
    frechet_distance_infinity,
    gaussian_frechet_distance,
    kernel_distance,
)


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d) + shift


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    cov_x, cov_y = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    cross = np.trace(linalg.sqrtm(cov_x @ cov_y)).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of the squared MMD, sum by sum (Gretton et al. 2012, eq. 3)."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2 * xy


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 1), (50, 80, 7), (100, 90, 64)])
def test_frechet_distance_equals_the_matrix_square_root(n: int, m: int, d: int) -> None:
    x, y = features(n, d, 0), features(m, d, 1, shift=0.3)
    assert frechet_distance(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-10)


def test_frechet_distance_is_the_same_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(200, 40, 0), features(150, 40, 1, shift=0.3)
    with_zeros = np.pad(x, ((0, 0), (0, 3))), np.pad(y, ((0, 0), (0, 3)))  # singular, although there are many images
    found = frechet_distance(x, y), frechet_distance(*with_zeros)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    assert (frechet_distance(x, y), frechet_distance(*with_zeros)) == pytest.approx(found, rel=1e-12)


def by_eigenvalues(x: np.ndarray, y: np.ndarray) -> float:
    """In all d dimensions, whatever the rank: tr sqrt(cov_x cov_y) by the eigenvalues of the product."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real.clip(0)).sum()
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


@pytest.mark.parametrize("n", [300, 30])
def test_copies_of_columns_change_nothing_but_the_time(n: int) -> None:
    """Grey images in three channels; one column is a copy in one of the sets alone, and others are constant.

    A zero eigenvalue is known to 1e-16 only, and its root to 1e-8.
    """
    x, y = features(n, 20, 20), features(200, 20, 21, shift=0.2)
    x[:, 4], y[:, 5], x[:, 6] = x[:, 3], 0.5, -0.25
    order = np.random.default_rng(0).permutation(60)
    copied = [np.tile(side, 3)[:, order] for side in (x, y)]
    small = [np.sqrt(3) * side for side in (x, y)]
    assert [side.shape for side in metrics._without_copies(*copied)] == [(n, 20), (200, 20)]
    assert frechet_distance(*copied) == pytest.approx(by_eigenvalues(*small), rel=1e-7)
    assert frechet_distance(*copied) == pytest.approx(by_eigenvalues(*copied), rel=1e-6)
    assert frechet_distance(*copied[::-1]) == pytest.approx(frechet_distance(*copied), rel=1e-7)


def test_columns_that_are_alike_at_first_and_not_to_the_end_are_no_copies() -> None:
    x, y = features(400, 6, 22), features(300, 6, 23)
    x[:, 2], y[:, 2] = x[:, 1], y[:, 1]
    y[-1, 2] += 1e-6
    assert [side is whole for side, whole in zip(metrics._without_copies(x, y), (x, y), strict=True)] == [False, False]
    assert [side.shape[1] for side in metrics._without_copies(x, y)] == [6, 6]
    y[-1, 2] -= 1e-6
    y[:, 2] = y[:, 1]
    assert [side.shape[1] for side in metrics._without_copies(x, y)] == [5, 5]


@pytest.mark.parametrize("n", [3, 50])
def test_images_that_are_all_the_same_have_a_distance(n: int) -> None:
    flat, y = np.tile(np.arange(5.0), (n, 1)), features(60, 5, 26)
    expected = np.square(flat[0] - y.mean(0)).sum() + np.cov(y, rowvar=False).trace()
    assert frechet_distance(flat, y) == pytest.approx(expected) == frechet_distance(y, flat)
    assert frechet_distance(flat, flat + 1) == pytest.approx(5)


@pytest.mark.parametrize("ranks", [(15, 15), (15, 40), (40, 15)])
def test_singular_covariances_of_many_images_have_the_distance_of_their_subspace(ranks: tuple[int, int]) -> None:
    """Real, generated or both in a subspace; no column is a copy."""
    turn = linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    low = [features(400, r, seed, shift=0.1) for r, seed in zip(ranks, (24, 25), strict=True)]
    x, y = (np.pad(side, ((0, 0), (0, 40 - side.shape[1]))) @ turn for side in low)
    padded = [np.pad(side, ((0, 0), (0, max(ranks) - side.shape[1]))) for side in low]
    found = frechet_distance(x, y)
    assert found == pytest.approx(by_eigenvalues(*padded), rel=1e-6)
    assert found == pytest.approx(by_eigenvalues(x, y), rel=1e-6)
    assert metrics.Gaussian.fitted(x).factor.shape[1] in (ranks[0], ranks[0] + 1)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_frechet_distance_equals_clean_fid() -> None:
    x, y = features(120, 40, 2), features(150, 40, 3, shift=0.1)
    assert frechet_distance(x, y) == pytest.approx(import_cleanfid("fid").fid_from_feats(x, y), rel=1e-10)


def test_frechet_distance_of_gaussians_with_known_distance() -> None:
    one = gaussian_frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert one == pytest.approx(3.0**2 + (2.0 - 3.0) ** 2, rel=1e-14)
    a, b = np.array([1.0, 4.0, 0.0, 9.0]), np.array([4.0, 4.0, 1.0, 0.25])
    diagonal = gaussian_frechet_distance(np.zeros(4), np.diag(a), np.ones(4), np.diag(b))
    assert diagonal == pytest.approx(4 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-14)
    turn = linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]  # a common rotation changes nothing
    turned = gaussian_frechet_distance(
        np.zeros(4), turn @ np.diag(a) @ turn.T, turn @ np.ones(4), turn @ np.diag(b) @ turn.T
    )
    # A zero eigenvalue is known to 1e-16 only, and its root to 1e-8.
    assert turned == pytest.approx(diagonal, rel=1e-7)


def test_frechet_distance_with_fewer_images_than_dimensions() -> None:
    # The images span a subspace: rotating it into few coordinates gives full-rank covariances and the same distance.
    low_x, low_y = features(40, 12, 4), features(30, 12, 5, shift=0.2)
    basis = linalg.qr(np.random.default_rng(6).normal(size=(90, 12)), mode="economic")[0]
    assert frechet_distance(low_x @ basis.T, low_y @ basis.T) == pytest.approx(by_sqrtm(low_x, low_y), rel=1e-10)
    x, y = features(20, 50, 7), features(90, 50, 8)  # one side alone is singular
    mean, cov = (lambda a: a.mean(0)), (lambda a: np.cov(a, rowvar=False))
    assert frechet_distance(x, y) == pytest.approx(
        gaussian_frechet_distance(mean(x), cov(x), mean(y), cov(y)), rel=1e-6
    )


@pytest.mark.parametrize("n", [20, 200])
def test_frechet_distance_of_a_set_from_itself_is_zero(n: int) -> None:
    x = features(n, 50, 9)
    assert 0 <= frechet_distance(x, x) < 1e-9 * np.square(x).sum()


@pytest.mark.parametrize("d", [6, 70])
def test_infinite_frechet_distance_is_the_intercept_of_the_papers_line(d: int) -> None:
    x, y = features(200, d, 10), features(300, d, 11, shift=0.2)
    rng, counts, values = np.random.default_rng(3), [], []
    for n in np.linspace(50, 200, 15).round().astype(int):  # Chong and Forsyth 2020, section 3
        subset = x[rng.choice(200, n, replace=False)]
        counts.append(n)
        values.append(frechet_distance(subset, y) if d == 70 else by_sqrtm(subset, y))
    (slope, intercept), covariance = np.polyfit(1 / np.array(counts), values, 1, cov=True)
    found = frechet_distance_infinity(x, y, seed=3)
    assert slope > 0
    assert found.value == pytest.approx(intercept, rel=1e-6)
    assert found.standard_error == pytest.approx(np.sqrt(covariance[1, 1]), rel=1e-6)


def test_infinite_frechet_distance_removes_the_bias_of_few_images() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(20000, 8))  # so many that only the other side is biased
    few = [rng.normal(size=(240, 8)) for _ in range(40)]
    plain = np.mean([frechet_distance(x, real) for x in few])
    found = np.mean([frechet_distance_infinity(x, real).value for x in few])
    assert abs(found) < plain / 4


def test_kernel_distance_equals_sums_over_all_pairs() -> None:
    x, y = features(25, 6, 0), features(25, 6, 1, shift=0.2)
    assert kernel_distance(x, y).value == pytest.approx(by_loops(x, y), rel=1e-12)


def test_kernel_distance_equals_clean_fid_where_subsets_are_everything() -> None:
    x, y = features(60, 20, 2), features(60, 20, 3, shift=0.1)
    assert kernel_distance(x, y).value == pytest.approx(import_cleanfid("fid").kernel_distance(y, x), rel=1e-9)


def test_distances_equal_torch_fidelity() -> None:
    import_cleanfid("fid")  # mends torchvision
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(70, 20, 12), features(70, 20, 13, shift=0.1)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    statistics = [fid_features_to_statistics(t) for t in tensors]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(fid, rel=1e-6)
    kid = kid_features_to_metric(*tensors, kid_subsets=2, kid_subset_size=70, kid_kernel="poly", verbose=False)
    assert kernel_distance(x, y).value == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-6)


def test_kernel_distance_of_subsets_is_the_mean_over_them() -> None:
    x, y = features(30, 6, 4), features(24, 6, 5, shift=0.2)
    rng = np.random.default_rng(11)
    values = []
    for _ in range(5):
        i, j = rng.choice(30, 10, replace=False), rng.choice(24, 10, replace=False)
        values.append(by_loops(x[i], y[j]))
    found = kernel_distance(x, y, subsets=5, subset_size=10, seed=11)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    assert found.standard_error == pytest.approx(np.sqrt(10 / 14) * np.std(values, ddof=1), rel=1e-12)


def test_kernel_distance_is_the_same_from_kernel_values_and_from_features() -> None:
    x, y = features(40, 6, 6), features(40, 6, 7, shift=0.2)
    found = kernel_distance(x, y, subsets=7, subset_size=19)  # 40 > 2 * 19: each subset computes its own kernel
    rng = np.random.default_rng(0)
    pairs = [(rng.choice(40, 19, replace=False), rng.choice(40, 19, replace=False)) for _ in range(7)]
    assert found.value == pytest.approx(np.mean([by_loops(x[i], y[j]) for i, j in pairs]), rel=1e-12)


def test_kernel_distance_repeats_and_is_unbiased() -> None:
    x, y = features(100, 10, 8), features(100, 10, 9)
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x, y, subset_size=20, seed=1) != kernel_distance(x, y, subset_size=20, seed=2)
    same = np.random.default_rng(0).normal(size=(40, 60, 5))
    values = [kernel_distance(a, b, subsets=3).value for a, b in same.reshape(20, 2, 60, 5)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(20)
    assert min(values) < 0


def test_standard_error_is_the_spread_over_fresh_images() -> None:
    rng = np.random.default_rng(1)
    draws = [
        kernel_distance(rng.normal(size=(150, 8)), rng.normal(size=(150, 8)) * 1.2 + 0.5, subsets=60) for _ in range(60)
    ]
    spread = np.std([d.value for d in draws], ddof=1)
    assert np.mean([d.standard_error for d in draws]) == pytest.approx(spread, rel=0.35)


def test_kernel_distance_of_three_images_has_no_standard_error() -> None:
    x, y = features(3, 4, 0), features(3, 4, 1)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(by_loops(x, y))
    assert np.isnan(found.standard_error)


def test_float32_features_are_computed_in_float64() -> None:
    x, y = (features(60, 16, s).astype(np.float32) for s in (0, 1))
    for distance in (frechet_distance, lambda a, b: kernel_distance(a, b).value):
        assert distance(x, y) == distance(x.astype(np.float64), y.astype(np.float64))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_what_has_no_distance_is_refused(distance) -> None:
    good = features(10, 4, 0)
    with pytest.raises(EvaluationError, match="generated images: 1 are too few"):
        distance(good[:1], good)
    with pytest.raises(EvaluationError, match="do not fit"):
        distance(good, good[:, :3])
    bad = good.copy()
    bad[2:4] = np.nan
    with pytest.raises(EvaluationError, match="real images: the features of 2 of 10 are not finite"):
        distance(good, bad)
