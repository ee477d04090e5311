"""Distances between two sets of features. Everything is computed in float64; lower is better."""

from __future__ import annotations

from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.errors import EvaluationError

__all__ = [
    "Estimate",
    "Gaussian",
    "checked_features",
    "frechet_distance",
    "frechet_distance_infinity",
    "gaussian_frechet_distance",
    "kernel_distance",
]

Features = NDArray[np.floating]
Floats = NDArray[np.float64]


_HEAD: Final = 64
"""Rows in which columns are compared at a time."""


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
    x, y = _without_copies(*checked_features(generated, real))
    return Gaussian.fitted(x).distance(Gaussian.fitted(y))


def frechet_distance_infinity(
    generated: Features, real: Features, *, sizes: int = 15, least: int = 5000, seed: int = 0
) -> Estimate:
    """The Frechet distance that infinitely many generated images would have; the real ones stay as they are.

    Chong and Forsyth, Effectively Unbiased FID and Inception Score and where to find them, CVPR 2020,
    arXiv:1911.07023, section 3: the distance of n images is biased by a term in 1/n, which depends on the model. So it
    is computed for random subsets of `sizes` evenly spaced sizes, and a line in 1/n is fitted; its value at 0 is
    returned.

    Args:
        generated: [n, d].
        real: [m, d].
        sizes: number of subsets; the last one is all of `generated`.
        least: size of the smallest subset, at most a quarter of n.
        seed: seed of the subsets.

    Returns:
        The intercept and its standard error by the residuals of the line. The subsets overlap, so that this says how
        well the line fits and not how much the value would vary with other images.

    Raises:
        EvaluationError: fewer than two real or twelve generated images, or shapes that do not fit.
    """
    x, y = _without_copies(*checked_features(generated, real))
    if len(x) < 12:
        raise EvaluationError(f"generated images: {len(x)} are too few to extrapolate from; use at least 12.")
    reference, rng = Gaussian.fitted(y), np.random.default_rng(seed)
    counts = np.unique(np.linspace(min(least, len(x) // 4), len(x), sizes).round().astype(np.int64))
    values = [Gaussian.fitted(x[rng.choice(len(x), n, replace=False)]).distance(reference) for n in counts]
    design = np.stack([np.ones(len(counts)), 1 / counts], axis=1)
    fit, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = np.array(values) - design @ fit
    variance = residual @ residual / (len(counts) - 2) * np.linalg.inv(design.T @ design)[0, 0]
    return Estimate(float(fit[0]), float(np.sqrt(variance)))


def _without_copies(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Both sets with columns that are alike in both put together, each times the root of their number.

    Grey images in three channels have three of each, for example. The distance stays: all features lie in the subspace
    where copies are equal, and these are their coordinates in it. What takes time grows with the cube of the dimension.

    Args:
        x: [n, d].
        y: [m, d].
    """
    head = np.concatenate([x[:_HEAD], y[:_HEAD]])  # copies are alike here, too
    _, first, group = np.unique(head, axis=1, return_index=True, return_inverse=True)
    if len(first) == x.shape[1]:
        return x, y
    column = first[group.ravel()]
    alike = np.ones(len(column), dtype=bool)
    for side in (x, y):
        for start in range(0, len(side), _HEAD):
            rows = side[start : start + _HEAD]
            alike &= (rows == rows[:, column]).all(axis=0)
    kept, copies = np.unique(np.where(alike, column, np.arange(len(column))), return_counts=True)
    weight = np.sqrt(copies)
    return x[:, kept] * weight, y[:, kept] * weight


def _singular_factor(cov: Floats) -> NDArray[np.floating]:
    """[d, k] matrix F with F F' = cov, [d, d] of rank k or nearly so; k is at least 1."""
    try:
        from scipy.linalg.lapack import dpstrf
    except ImportError:
        eigenvalues, vectors = np.linalg.eigh(cov)
        scaled: NDArray[np.floating] = vectors * np.sqrt(eigenvalues.clip(0))
        return scaled
    # What is left out has pivots below the rounding error of the largest.
    root, pivots, rank, _ = dpstrf(cov, lower=1, tol=np.finfo(np.float64).eps * np.diag(cov).max())
    factor = np.zeros((len(cov), max(rank, 1)))
    factor[pivots - 1, :rank] = np.tril(root)[:, :rank]
    return factor


class Gaussian:
    """Mean and covariance of features, with what a Frechet distance needs of them, computed once."""

    def __init__(self, mean: Floats, cov: Floats | None, centred: Floats | None) -> None:
        self.mean = mean
        self._cov = cov
        self._centred = centred  # [n, d] with centred' centred = cov

    @classmethod
    def fitted(cls, features: Floats) -> Gaussian:
        """Of features [n, d], with the unbiased covariance."""
        mean = features.mean(axis=0)
        return cls(mean, None, (features - mean) / np.sqrt(len(features) - 1))

    @cached_property
    def trace(self) -> float:
        """Of the covariance."""
        return float(np.trace(self.cov) if self._centred is None else np.square(self._centred).sum())

    @cached_property
    def cov(self) -> Floats:
        """[d, d] covariance."""
        if self._cov is not None:
            return self._cov
        assert self._centred is not None
        return self._centred.T @ self._centred

    @cached_property
    def factor(self) -> Floats:
        """[d, k] matrix F with F F' = cov and k at most d.

        The images themselves where there are fewer than dimensions, else the Cholesky factor. Where the covariance is
        singular all the same, that is taken with pivots and has as many columns as the covariance has rank; without
        SciPy it comes from eigenvectors.
        """
        if self._is_small:
            assert self._centred is not None
            return self._centred.T
        root: NDArray[np.floating]
        try:
            root = np.linalg.cholesky(self.cov)
        except np.linalg.LinAlgError:
            root = _singular_factor(self.cov)
        return root.astype(np.float64, copy=False)

    def distance(self, other: Gaussian) -> float:
        """``|mean_x - mean_y|^2 + tr cov_x + tr cov_y - 2 tr sqrt(cov_x cov_y)``.

        The last trace is that of the symmetric ``sqrt(F' cov_x F)`` with ``F F' = cov_y``, whose eigenvalues are real:
        no complex square root is needed. With few images it is the sum of the singular values of ``F_x' F_y``.
        """
        if self._is_small or other._is_small:
            cross = np.linalg.svd(self.factor.T @ other.factor, compute_uv=False).sum()
        else:
            cross = np.sqrt(self._eigenvalues_of_product(other).clip(0)).sum()
        shift = self.mean - other.mean
        # rounding may go below zero
        return max(float(shift @ shift + self.trace + other.trace - 2 * cross), 0.0)

    def _eigenvalues_of_product(self, other: Gaussian) -> Floats:
        """Of ``cov_x cov_y``, as those of ``F' cov_x F``; where SciPy is, by LAPACK's reduction in place."""
        try:
            from scipy.linalg import LinAlgError, eigh
        except ImportError:
            return np.linalg.eigvalsh(other.factor.T @ self.cov @ other.factor).astype(np.float64, copy=False)
        try:
            found: Floats = eigh(self.cov, other.cov, type=2, eigvals_only=True, driver="gv", check_finite=False)
        except LinAlgError:  # a covariance that is singular all the same has no Cholesky factor
            found = np.linalg.eigvalsh(other.factor.T @ self.cov @ other.factor).astype(np.float64, copy=False)
        return found

    @property
    def _is_small(self) -> bool:
        """Whether there are no more images than dimensions."""
        return self._centred is not None and len(self._centred) <= len(self.mean)


def gaussian_frechet_distance(mean_x: Floats, cov_x: Floats, mean_y: Floats, cov_y: Floats) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians with means [d] and covariances [d, d]."""
    return Gaussian(mean_x, cov_x, None).distance(Gaussian(mean_y, cov_y, None))


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
    x, y = checked_features(generated, real)
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


def checked_features(generated: Features, real: Features) -> tuple[Floats, Floats]:
    """Both sets of features in float64.

    Raises:
        EvaluationError: shapes that do not fit, fewer than two images on a side, or values that are not finite.
    """
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
