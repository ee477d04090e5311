"""Distances between two sets of features. Everything is computed in float64; lower is better."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.errors import EvaluationError

__all__ = ["Estimate", "frechet_distance", "gaussian_frechet_distance", "kernel_distance"]

Features = NDArray[np.floating]
Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    standard_error: float


def frechet_distance(generated: Features, real: Features) -> float:
    """Squared Frechet distance of the Gaussians fitted to two feature sets.

    Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, arXiv:1706.08500, eq. 6, with unbiased
    covariances (ddof = 1), as clean-fid has it. With fewer images than dimensions the covariances are singular;
    the distance is still well defined and computed from the samples themselves.

    Args:
        generated: [n, d].
        real: [m, d].

    Raises:
        EvaluationError: fewer than two images on a side, or shapes that do not fit.
    """
    x, y = _checked(generated, real)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = (x - mean_x) / np.sqrt(len(x) - 1), (y - mean_y) / np.sqrt(len(y) - 1)
    if min(len(x), len(y)) > x.shape[1]:
        return gaussian_frechet_distance(mean_x, x.T @ x, mean_y, y.T @ y)
    # With covariances x'x and y'y, tr sqrt(x'x y'y) is the nuclear norm of the n x m matrix x y'.
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return _distance(mean_x - mean_y, np.square(x).sum(), np.square(y).sum(), cross)


def gaussian_frechet_distance(mean_x: Floats, cov_x: Floats, mean_y: Floats, cov_y: Floats) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians with means [d] and covariances [d, d].

    ``|mean_x - mean_y|^2 + tr cov_x + tr cov_y - 2 tr sqrt(cov_x cov_y)``. The last trace is that of the symmetric
    ``sqrt(sqrt(cov_x) cov_y sqrt(cov_x))``, whose eigenvalues are real: no complex square root is needed.
    """
    eigenvalues, vectors = np.linalg.eigh(cov_x)
    root_x = vectors * np.sqrt(eigenvalues.clip(0))
    cross = np.sqrt(np.linalg.eigvalsh(root_x.T @ cov_y @ root_x).clip(0)).sum()
    return _distance(mean_x - mean_y, np.trace(cov_x), np.trace(cov_y), cross)


def kernel_distance(
    generated: Features, real: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel distance (KID): the unbiased squared MMD with the kernel ``(x.y / d + 1)^3``.

    Binkowski et al., Demystifying MMD GANs, ICLR 2018, arXiv:1801.01401. The value is the mean over random subsets of
    `subset_size` images of each side, as in clean-fid; where neither side has more, the one subset is everything.
    The same seed draws the same subsets. The value can be slightly negative for very similar sets.

    The standard error says how much the value would vary with other images. It is the delete-d jackknife (Shao and
    Wu, Annals of Statistics 17, 1989) over subsets of at most half of the images: sqrt(k / (n - k)) times the spread of
    the values of subsets of size k. For two sets that hardly differ it errs on the large side.

    Args:
        generated: [n, d].
        real: [m, d].
        subsets: random subsets.
        subset_size: images of each side in a subset, at most.
        seed: seed of the subsets.

    Raises:
        EvaluationError: fewer than two images on a side, or shapes that do not fit.
    """
    x, y = _checked(generated, real)
    images = min(len(x), len(y))
    whole = max(len(x), len(y)) <= subset_size
    gram = _Gram(x, y) if max(len(x), len(y)) <= 2 * subset_size else None
    rng = np.random.default_rng(seed)

    def values(size: int) -> Floats:
        drawn = []
        for _ in range(subsets):
            i, j = rng.choice(len(x), size, replace=False), rng.choice(len(y), size, replace=False)
            drawn.append(gram.mmd(i, j) if gram else _Gram(x[i], y[j]).mmd())
        return np.array(drawn)

    value_size, error_size = min(images, subset_size), min(images // 2, subset_size)
    if whole and gram and len(x) == len(y):
        value, spread = gram.mmd(), None
    else:
        found = values(value_size)
        value, spread = float(found.mean()), found if value_size == error_size else None
    if error_size < 2:
        return Estimate(value, float("nan"))
    spread = values(error_size) if spread is None else spread
    return Estimate(value, float(np.sqrt(error_size / (images - error_size)) * spread.std(ddof=1)))


class _Gram:
    """Kernel values between all pairs of two sets."""

    def __init__(self, x: Floats, y: Floats) -> None:
        dimension = x.shape[1]
        self.xx, self.yy, self.xy = ((a @ b.T / dimension + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))

    def mmd(self, i: NDArray[np.int64] | None = None, j: NDArray[np.int64] | None = None) -> float:
        """Unbiased squared MMD of the subsets `i` of x and `j` of y; of everything without them."""
        xx = self.xx if i is None else self.xx[np.ix_(i, i)]
        yy = self.yy if j is None else self.yy[np.ix_(j, j)]
        xy = self.xy if i is None or j is None else self.xy[np.ix_(i, j)]
        within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
        return float(within - 2 * xy.mean())


def _distance(shift: Floats, trace_x: float, trace_y: float, cross: float) -> float:
    return max(float(shift @ shift + trace_x + trace_y - 2 * cross), 0.0)  # rounding may go below zero


def _checked(generated: Features, real: Features) -> tuple[Floats, Floats]:
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise EvaluationError(f"features: shapes {x.shape} and {y.shape} do not fit; both must be [images, dimension].")
    for side, features in (("generated", x), ("real", y)):
        if len(features) < 2:
            raise EvaluationError(f"{side} images: {len(features)} are too few for a distance; use at least 2.")
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise EvaluationError(
                f"{side} images: the features of {bad} of {len(features)} are not finite; the network has diverged."
            )
    return x, y
