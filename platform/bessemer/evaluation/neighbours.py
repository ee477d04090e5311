"""Metrics of nearest neighbours: fidelity and diversity apart, and whether images are copies of training images.

Distances are Euclidean, in float64, computed in blocks of rows: memory grows with the number of images and not with
its square. A point is never its own neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bessemer.errors import EvaluationError
from bessemer.evaluation.metrics import checked_features

__all__ = [
    "Fidelity",
    "Neighbours",
    "density_coverage",
    "nearest",
    "precision_recall",
    "squared_distances",
    "suspicious",
]

Features = NDArray[np.floating]
Floats = NDArray[np.float64]

_BLOCK_VALUES: Final = 1 << 24  # 128 MiB of distances at a time
_SAME: Final = 1e-13  # of the squared norms: what rounding leaves of the distance of two equal points


@dataclass(frozen=True)
class Fidelity:
    """How real the generated images are, and how much of the real ones they show."""

    fidelity: float
    """Precision or density."""
    diversity: float
    """Recall or coverage."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest real image of each generated one."""

    ids: NDArray[np.int64]
    """[n] rows of the real features."""
    distance: Floats
    """[n] Euclidean distance to it."""
    ratio: Floats
    """[n] that distance over the distance of the real image to the real image nearest to it; 0 is a copy. Infinite
    where the real image has a duplicate and the generated one differs; 1 where all three are equal."""


def precision_recall(generated: Features, real: Features, k: int = 3) -> Fidelity:
    """Improved precision and recall.

    Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, NeurIPS 2019,
    arXiv:1904.06991, eqs. 1 and 2: the share of one set that lies within the distance of any point of the other to that
    point's k-th neighbour in its own set.

    Args:
        generated: [n, d].
        real: [m, d].
        k: neighbours; the paper takes 3.

    Raises:
        EvaluationError: shapes that do not fit, or not more than k images on a side.
    """
    x, y = _checked(generated, real, k)
    within_x, within_y = _radii(x, k), _radii(y, k)
    covered = np.zeros(len(y), dtype=bool)
    inside = 0
    for rows, squared in _blocks(x, y):
        inside += int((squared <= within_y).any(axis=1).sum())
        covered |= (squared <= within_x[rows, None]).any(axis=0)
    return Fidelity(inside / len(x), float(covered.mean()))


def density_coverage(generated: Features, real: Features, k: int = 5) -> Fidelity:
    """Density and coverage.

    Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, ICML 2020, arXiv:2002.09797, eqs. 3 and
    4. Both use neighbourhoods of real images only, so single outliers of the generated ones do no harm. Density may be
    more than 1.

    Args:
        generated: [n, d].
        real: [m, d].
        k: neighbours; the paper takes 5.

    Raises:
        EvaluationError: shapes that do not fit, or not more than k images on a side.
    """
    x, y = _checked(generated, real, k)
    within_y = _radii(y, k)
    covered = np.zeros(len(y), dtype=bool)
    count = 0
    for _, squared in _blocks(x, y):
        holds = squared <= within_y
        count += int(holds.sum())
        covered |= holds.any(axis=0)
    return Fidelity(count / (k * len(x)), float(covered.mean()))


def nearest(generated: Features, real: Features) -> Neighbours:
    """The real image nearest to each generated one, and how near it is for one that is not a copy.

    The ratio is that of Alaa et al., How Faithful is your Synthetic Data?, ICML 2022, arXiv:2102.08921, section 4.3: a
    generated image is suspected to be memorised when it is nearer to a training image than the training image nearest
    to that one.

    Args:
        generated: [n, d].
        real: [m, d]: the training set, all of it.

    Raises:
        EvaluationError: shapes that do not fit, or fewer than two images on a side.
    """
    x, y = _checked(generated, real, 1)
    own = np.sqrt(_radii(y, 1))
    ids, distance = np.empty(len(x), dtype=np.int64), np.empty(len(x))
    for rows, squared in _blocks(x, y):
        ids[rows] = squared.argmin(axis=1)
        distance[rows] = np.sqrt(squared.min(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = distance / own[ids]
    return Neighbours(ids, distance, np.where(np.isnan(ratio), 1.0, ratio))


def suspicious(found: Neighbours) -> NDArray[np.bool_]:
    """Which generated images are nearer to a real one than any other real one is (ratio below 1), or equal to it."""
    suspected: NDArray[np.bool_] = (found.ratio < 1) | (found.distance == 0)
    return suspected


def squared_distances(x: Floats, y: Floats) -> Floats:
    """[n, m] squared Euclidean distances of the rows; exactly 0 for equal ones."""
    norms = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    squared: Floats = norms - 2 * (x @ y.T)
    squared[squared <= _SAME * norms] = 0
    return squared


def _blocks(x: Floats, y: Floats) -> Iterator[tuple[slice, Floats]]:
    """Squared distances of some rows of `x` to all of `y`."""
    size = max(_BLOCK_VALUES // len(y), 1)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, squared_distances(x[rows], y)


def _radii(x: Floats, k: int) -> Floats:
    """[n] squared distance of each point to its k-th neighbour among the others."""
    found = np.empty(len(x))
    for rows, squared in _blocks(x, x):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        found[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return found


def _checked(generated: Features, real: Features, k: int) -> tuple[Floats, Floats]:
    x, y = checked_features(generated, real)
    if min(len(x), len(y)) <= k:
        raise EvaluationError(
            f"{len(x)} generated and {len(y)} real images: a metric of {k} neighbours needs at least {k + 1} of each."
        )
    return x, y
