"""From features to values: each kind of metric, with what it says besides its value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.errors import EvaluationError
from bessemer.evaluation.classify import accuracy, check_classes, fit_linear, fit_resnet
from bessemer.evaluation.metrics import frechet_distance, frechet_distance_infinity, kernel_distance
from bessemer.evaluation.names import MetricKind
from bessemer.evaluation.neighbours import Fidelity, density_coverage, nearest, precision_recall, suspicious
from bessemer.evaluation.score import Head, class_probabilities, inception_score

__all__ = ["Comparison", "FeatureSet", "Value"]

_SHOWN: Final = 16  # pairs of the memorisation check that a record names


@dataclass(frozen=True)
class FeatureSet:
    """Features of images or clips, and their classes."""

    features: NDArray[np.float32]
    """[n, d] of images; [n, t * d] of clips, those of one frame after another."""
    ids: NDArray[np.int64]
    """[n] number of each image in its set."""
    labels: NDArray[np.int64]
    """[n]."""
    classes: tuple[str, ...]
    """Names of the classes."""
    frames: int = 1
    """t, frames of a clip; 1 for images."""

    def __len__(self) -> int:
        return len(self.features)

    @property
    def by_frame(self) -> NDArray[np.float32]:
        """[n, t, d]."""
        return self.features.reshape(len(self.features), self.frames, -1)


@dataclass(frozen=True)
class Value:
    """What a metric says."""

    value: float
    standard_error: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """Values of the classes, or the nearest pairs."""


class Comparison:
    """Two sets of features; what several kinds of metric share is computed once.

    Args:
        generated: features of generated images.
        real: features of real images.
        head: classifier of the extractor, for the Inception Score.
        seed: of what is trained, for the classification accuracy.
        device: where it is trained.
    """

    def __init__(
        self,
        generated: FeatureSet,
        real: FeatureSet,
        head: Head | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._generated, self._real, self._head = generated, real, head
        self._seed, self._device = seed, device

    @cached_property
    def _precision_recall(self) -> Fidelity:
        return precision_recall(self._generated.features, self._real.features)

    @cached_property
    def _density_coverage(self) -> Fidelity:
        return density_coverage(self._generated.features, self._real.features)

    def value(self, kind: MetricKind) -> Value:
        """The value of one kind of metric, a key of :data:`bessemer.evaluation.names.KINDS`.

        Raises:
            EvaluationError: too few images, classes that differ, or no classifier.
        """
        generated, real = self._generated, self._real
        x, y = generated.features, real.features
        match kind:
            case "fd":
                return Value(frechet_distance(x, y))
            case "kid":
                return Value(*kernel_distance(x, y))
            case "precision":
                return Value(self._precision_recall.fidelity)
            case "recall":
                return Value(self._precision_recall.diversity)
            case "density":
                return Value(self._density_coverage.fidelity)
            case "coverage":
                return Value(self._density_coverage.diversity)
            case "fdinf":
                return Value(*frechet_distance_infinity(x, y))
            case "fdframes":
                return Value(frechet_distance(*(np.concatenate(side.by_frame) for side in (generated, real))))
            case "fdsteps":
                return Value(frechet_distance(*(np.concatenate(_steps(side)) for side in (generated, real))))
            case "intrafd":
                return _by_class(self._generated, self._real)
            case "is":
                if self._head is None:
                    raise EvaluationError("Inception Score: these weights hold no classifier; use is_efflite0.")
                return Value(*inception_score(class_probabilities(x, self._head)))
            case "cas" | "cas-resnet":
                return self._classified(by_resnet=kind == "cas-resnet")
            case "memorised":
                return _memorised(self._generated, self._real)
            case _:
                raise AssertionError(f"{kind} compares no features")

    def _classified(self, *, by_resnet: bool) -> Value:
        generated, real = self._generated, self._real
        _check_same_classes(generated, real, "classification accuracy")
        classes = len(real.classes)
        check_classes(generated.labels, classes)
        if by_resnet:
            classify = fit_resnet(generated.features, generated.labels, classes, seed=self._seed, device=self._device)
        else:
            classify = fit_linear(generated.features, generated.labels, classes)
        found = accuracy(classify(real.features), real.labels, classes)
        by_class = dict(zip(real.classes, found.by_class, strict=True))
        return Value(found.value, found.standard_error, {"classes": by_class})


def _steps(clips: FeatureSet) -> NDArray[np.float32]:
    """[n, t - 1, d] differences of neighbouring frames: what moves, and how evenly, whatever is shown."""
    return np.diff(clips.by_frame, axis=1)


def _check_same_classes(generated: FeatureSet, real: FeatureSet, metric: str) -> None:
    if generated.classes != real.classes:
        only = sorted(set(generated.classes) ^ set(real.classes))
        raise EvaluationError(
            f"{metric}: the two sets have different classes ({', '.join(only[:5]) or 'in another order'}); "
            "name the class folders of the images like the classes of the data set."
        )


def _by_class(generated: FeatureSet, real: FeatureSet) -> Value:
    """Miyato and Koyama, cGANs with Projection Discriminator, ICLR 2018, arXiv:1802.05637, section 5: intra-FID."""
    _check_same_classes(generated, real, "distance by class")
    values = {}
    for number, name in enumerate(real.classes):
        x, y = generated.features[generated.labels == number], real.features[real.labels == number]
        if min(len(x), len(y)) < 2:
            raise EvaluationError(
                f"distance by class: class {name} has {len(x)} generated and {len(y)} real images, but a distance "
                "needs 2 of each; take more images."
            )
        values[name] = frechet_distance(x, y)
    return Value(float(np.mean(list(values.values()))), details={"classes": values})


def _memorised(generated: FeatureSet, real: FeatureSet) -> Value:
    """The share of suspects, and the pairs of which it is most likely, nearest first."""
    found = nearest(generated.features, real.features)
    order = np.lexsort((found.distance, np.where(found.distance == 0, 0.0, found.ratio)))[:_SHOWN]
    pairs = [
        {
            "image": int(generated.ids[i]),
            "real": int(real.ids[found.ids[i]]),
            "distance": float(found.distance[i]),
            "ratio": float(found.ratio[i]) if np.isfinite(found.ratio[i]) else None,
        }
        for i in order
    ]
    return Value(float(suspicious(found).mean()), details={"pairs": pairs})
