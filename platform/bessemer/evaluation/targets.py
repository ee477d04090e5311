"""How near translations come to the targets of their inputs, pair by pair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.inputs import Inputs
from bessemer.evaluation.names import TARGETS
from bessemer.evaluation.reconstruction import psnr, ssim
from bessemer.evaluation.records import EvaluationRecord
from bessemer.evaluation.sampling import to_uint8
from bessemer.systems.contract import System

__all__ = ["check_targets", "nearness", "records_of_pairs"]


def _l1(images: Tensor, originals: Tensor) -> Tensor:
    """[N] mean absolute difference of uint8 images, as shares of 255."""
    return (images.double() - originals.double()).abs().flatten(1).mean(1) / 255


_COMPUTE: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {"l1": _l1, "psnr": psnr, "ssim": ssim}


def check_targets(system: System, metric: str) -> None:
    """Refuse a metric of translated pairs for a system that has no targets.

    Raises:
        EvaluationError: names the metric and what to use instead.
    """
    if not (system.given and "targets" in system.takes):
        raise EvaluationError(
            f"metric {metric}: compares translations with their targets, and {system.name} has none; use metrics of "
            "its samples, such as kid_efflite0."
        )


def nearness(metrics: Sequence[str], pixels: Tensor, inputs: Inputs, rows: slice) -> NDArray[np.float64]:
    """How near translations come to their targets.

    Args:
        metrics: keys of :data:`bessemer.evaluation.names.TARGETS`.
        pixels: uint8 [n, C, R, R], the translations of `inputs` in `rows`.
        inputs: of a data set that has targets.
        rows: which of them.

    Returns:
        [n, metrics].
    """
    targets = to_uint8(inputs.batch(rows, pixels.device)["targets"])
    values: NDArray[np.float64] = torch.stack([_COMPUTE[m](pixels, targets) for m in metrics], 1).cpu().numpy()
    return values


def records_of_pairs(
    metrics: Sequence[str], near: NDArray[np.float64], inputs: Inputs, facts: Mapping[str, Any], started: float
) -> list[EvaluationRecord]:
    """One record per metric.

    Args:
        metrics: keys of :data:`bessemer.evaluation.names.TARGETS`.
        near: [samples, metrics] of :func:`nearness`.
        inputs: of the translations.
        facts: fields that all records of the evaluation share.
        started: when the evaluation began, by :func:`time.perf_counter`.
    """
    means = [_mean(values) for values in near.T]
    return [
        EvaluationRecord(
            metric=metric,
            value=value,
            standard_error=error,
            higher_is_better=TARGETS[metric].higher_is_better,
            estimator=TARGETS[metric].estimator,
            reference_samples=len(inputs),
            reference_hash=inputs.hash,
            extractor="",
            extractor_sha256="",
            preprocessing="",
            details={},
            seconds=time.perf_counter() - started,
            **facts,
        )
        for metric, (value, error) in zip(metrics, means, strict=True)
    ]


def _mean(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Mean of the finite ones of [n] values, and its standard error; `psnr` of what equals its target is infinite."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return float(finite.mean()) if len(finite) else math.inf, None
    return float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(len(finite)))
