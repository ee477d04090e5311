"""What one evaluation says: a number together with the protocol that it was measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

__all__ = ["EvaluationRecord", "SampledWeights", "weights_name"]


class SampledWeights(Protocol):
    """What evaluation asks about the weights; :class:`bessemer.systems.snapshot.SnapshotInfo` has it."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes."""

    @property
    def class_counts(self) -> Sequence[int]:
        """Training images of each class."""

    @property
    def ema(self) -> Mapping[str, Any]:
        """Profile of the moving average."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights file; empty for weights that were never written."""


def weights_name(ema: Mapping[str, Any]) -> str:
    """What records say of which weights were judged: the profile of a snapshot's moving average."""
    return " ".join(["ema", *(f"{key}={value}" for key, value in sorted(ema.items()))])


@dataclass(frozen=True)
class EvaluationRecord:
    """One metric of one set of weights. Two values may be compared when all but the value's own fields agree."""

    metric: str
    """Name as in :data:`bessemer.evaluation.names.METRICS` or :data:`bessemer.evaluation.names.TARGETS`."""
    value: float
    """The metric; of `psnr`, the mean over the pairs that differ at all."""
    standard_error: float | None
    """Standard error of `value`; ``None`` where the metric has none."""
    higher_is_better: bool
    """Whether more is better; distances are better the lower they are."""
    estimator: str
    """Settings of the computation from features, such as the number of neighbours."""
    samples: int
    """Generated images."""
    reference_samples: int
    """Real images, or pairs; 0 where a system's samples are compared with each other."""
    reference_hash: str
    """Names the reference features: data set, choice of images, extractor, preprocessing; or the pairs."""
    extractor: str
    """Feature extractor; empty where pairs are compared pixel by pixel."""
    extractor_sha256: str
    """Hash of the extractor's weights file; empty where it has no weights."""
    preprocessing: str
    """Name of what happens to an image before the extractor."""
    seed: int | None
    """Seed of the latents; ``None`` for images that others made."""
    truncation: float | None
    """Truncation of the latents; ``None`` for none."""
    balance: str
    """Classes of the generated images: in proportions of the `data`, `uniform`, or as they were `given`; of
    translations, which `inputs` they were made from."""
    weights: str
    """Which weights were sampled, by the profile of the moving average; `images` for images that others made."""
    weights_sha256: str
    """Hash of the snapshot's weights, or of the images that others made; empty where weights were never written."""
    details: dict[str, Any]
    """What the metric says besides its value: values of the `classes`, or the nearest `pairs` of image and real."""
    seconds: float
    """Wall time of the whole evaluation that this metric was part of; the one field that varies between repeats."""

    def as_dict(self) -> dict[str, Any]:
        """The record as the journal keeps it."""
        return asdict(self)
