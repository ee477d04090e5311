import numpy as np
import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation import neighbours
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.neighbours import density_coverage, nearest, precision_recall, squared_distances, suspicious


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ np.diag(np.linspace(0.5, 2, d)) + shift


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True))))


def radius(points: np.ndarray, i: int, k: int) -> float:
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def manifold_share(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """Kynkäänniemi et al. 2019, eqs. 1 and 2, point by point."""
    radii = [radius(manifold, i, k) for i in range(len(manifold))]
    inside = [any(distance(p, q) <= r for q, r in zip(manifold, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize(("n", "m", "d", "k", "shift"), [(40, 55, 4, 3, 0.5), (30, 20, 2, 1, 1.0), (25, 25, 7, 5, 0.2)])
def test_precision_and_recall_are_those_of_the_paper(n: int, m: int, d: int, k: int, shift: float) -> None:
    x, y = features(n, d, 0, shift), features(m, d, 1)
    found = precision_recall(x, y, k)
    assert 0 < found.fidelity < 1 or 0 < found.diversity < 1
    assert found.fidelity == pytest.approx(manifold_share(x, y, k), abs=1e-12)
    assert found.diversity == pytest.approx(manifold_share(y, x, k), abs=1e-12)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    import_cleanfid("fid")  # mends torchvision
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(150, 8, 2, 0.4), features(200, 8, 3)
    theirs = prc_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        prc_neighborhood=3,
        prc_batch_size=64,
        save_cpu_ram=True,
        verbose=False,
    )
    found = precision_recall(x, y)
    assert found.fidelity == pytest.approx(theirs["precision"], abs=1e-6)
    assert found.diversity == pytest.approx(theirs["recall"], abs=1e-6)
    assert found.fidelity != found.diversity


@pytest.mark.parametrize(("n", "m", "k"), [(40, 55, 5), (30, 20, 2)])
def test_density_and_coverage_are_those_of_the_paper(n: int, m: int, k: int) -> None:
    x, y = features(n, 3, 4, 0.4), features(m, 3, 5)
    balls = [radius(y, j, k) for j in range(m)]
    holds = [[distance(x[i], y[j]) <= balls[j] for j in range(m)] for i in range(n)]  # Naeem et al. 2020, eqs. 3 and 4
    found = density_coverage(x, y, k)
    assert found.fidelity == pytest.approx(sum(map(sum, holds)) / (k * n), rel=1e-12)
    assert found.diversity == pytest.approx(sum(any(row[j] for row in holds) for j in range(m)) / m, rel=1e-12)
    assert 0 < found.diversity < 1


def test_one_outlier_fools_recall_and_not_coverage() -> None:
    # Naeem et al. 2020, figure 4: a far generated image has a huge neighbourhood, which holds real images.
    real = features(60, 2, 6)
    fake = np.full((60, 2), 30.0) + np.random.default_rng(0).normal(size=(60, 2)) * 1e-3
    fake[0] = -200.0
    assert precision_recall(fake, real).diversity == 1.0
    assert density_coverage(fake, real).diversity == 0.0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(50, 5, 7, 0.3), features(64, 5, 8)
    whole = precision_recall(x, y), density_coverage(x, y), nearest(x, y)
    monkeypatch.setattr(neighbours, "_BLOCK_VALUES", 200)
    assert (precision_recall(x, y), density_coverage(x, y)) == whole[:2]
    np.testing.assert_array_equal(nearest(x, y).ids, whole[2].ids)


def test_copies_of_training_images_are_found() -> None:
    real = features(80, 6, 9)
    fresh = features(20, 6, 10)
    copied = real[[3, 50, 7]] + 1e-4
    found = nearest(np.concatenate([fresh, copied, real[:1]]), real)
    assert found.ids[-4:].tolist() == [3, 50, 7, 0]
    assert found.distance[-1] == 0.0
    assert (found.ratio[-4:] < 1e-3).all()
    assert suspicious(found)[-4:].all()
    for i in range(20):  # Alaa et al. 2022, section 4.3, image by image
        j = min(range(80), key=lambda j: distance(fresh[i], real[j]))
        own = radius(real, j, 1)
        assert found.ids[i] == j
        assert found.ratio[i] == pytest.approx(distance(fresh[i], real[j]) / own, rel=1e-9)
        assert suspicious(found)[i] == (distance(fresh[i], real[j]) < own)
    assert 0 < suspicious(found)[:20].sum() < 20


def test_duplicates_in_the_training_set() -> None:
    real = np.repeat(features(10, 4, 11), 2, axis=0)
    fresh = features(5, 4, 12)
    found = nearest(np.concatenate([fresh, real[:1]]), real)
    assert np.isinf(found.ratio[:5]).all()
    assert suspicious(found).tolist() == [False] * 5 + [True]


def test_equal_rows_are_at_distance_zero_however_large_they_are() -> None:
    x = features(30, 200, 13) * 1e4 + 1e5
    assert (np.diag(squared_distances(x, x.copy())) == 0).all()
    apart = squared_distances(x[:5], x[5:])
    np.testing.assert_allclose(apart, [[distance(a, b) ** 2 for b in x[5:]] for a in x[:5]], rtol=1e-6)


@pytest.mark.parametrize(("metric", "k"), [(precision_recall, 3), (density_coverage, 5), (nearest, 1)])
def test_too_few_images_are_refused(metric, k: int) -> None:
    good = features(20, 4, 14)
    with pytest.raises(EvaluationError, match=r"images?:? .*(too few|neighbours needs at least)"):
        metric(good[:k], good)
