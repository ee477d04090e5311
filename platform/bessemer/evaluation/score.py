"""The Inception Score: of generated images alone, by a classifier."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.errors import EvaluationError
from bessemer.evaluation.metrics import Estimate

__all__ = ["Head", "class_probabilities", "inception_score"]

Floats = NDArray[np.float64]


class Head(NamedTuple):
    """The linear classifier on top of an extractor's features."""

    weight: NDArray[np.float32]
    """[classes, d]."""
    bias: NDArray[np.float32] | None
    """[classes]; None where the score is defined without it."""


def class_probabilities(features: NDArray[np.floating], head: Head) -> Floats:
    """[n, classes] softmax of the classifier, in float64."""
    logits = np.asarray(features, dtype=np.float64) @ head.weight.T.astype(np.float64)
    if head.bias is not None:
        logits += head.bias
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    probabilities: Floats = p / p.sum(axis=1, keepdims=True)
    return probabilities


def inception_score(probabilities: Floats, splits: int = 10) -> Estimate:
    """Inception Score: ``exp E_x KL(p(y|x) || p(y))``, the mean over consecutive splits of the images.

    Salimans et al., Improved Techniques for Training GANs, NeurIPS 2016, arXiv:1606.03498, section 4. The standard
    error is that of the mean: the spread over the splits, which papers print, divided by their root.

    Args:
        probabilities: [n, classes] of generated images.
        splits: parts; each has its own marginal p(y).

    Raises:
        EvaluationError: fewer than two images per split.
    """
    if len(probabilities) < 2 * splits:
        raise EvaluationError(
            f"generated images: {len(probabilities)} are too few for an Inception Score of {splits} splits; "
            f"use at least {2 * splits}."
        )
    scores = []
    for p in np.array_split(probabilities, splits):
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p * (np.log(p) - np.log(p.mean(axis=0))), 0.0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores, ddof=1) / np.sqrt(splits)))
