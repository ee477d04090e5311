"""What one evaluation says: a number together with the protocol that it was measured by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["EvaluationRecord"]


@dataclass(frozen=True)
class EvaluationRecord:
    """One metric of one set of weights. Two values may be compared when all but the value's own fields agree."""

    metric: str
    """Name as in :data:`bessemer.evaluation.names.METRICS`."""
    value: float
    """The metric; lower is better."""
    standard_error: float | None
    """Standard error of `value`; ``None`` where the metric has none."""
    samples: int
    """Generated images."""
    reference_samples: int
    """Real images."""
    reference_hash: str
    """Names the reference features: data set, choice of images, extractor, preprocessing."""
    extractor: str
    """Feature extractor."""
    extractor_sha256: str
    """Hash of the extractor's weights file."""
    preprocessing: str
    """Name of what happens to an image before the extractor."""
    seed: int
    """Seed of latents."""
    truncation: float | None
    """Truncation of the latents; ``None`` for none."""
    weights: str
    """Which weights were sampled: the profile of the moving average."""
    weights_sha256: str
    """Hash of the snapshot's weights; empty where they were never written."""
    seconds: float
    """Wall time of the whole evaluation that this metric was part of; the one field that varies between repeats."""

    def as_dict(self) -> dict[str, Any]:
        """The record as the journal keeps it."""
        return asdict(self)
