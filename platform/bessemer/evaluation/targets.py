"""How near translations come to the targets of their inputs, pair by pair.

Pairs are dealt to workers in chunks, and each chunk has its own random generator, the one that its samples are drawn by
in :mod:`bessemer.evaluation.evaluate`: so the images are those, and the values are the same on any number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.images import RealImages
from bessemer.evaluation.inputs import Inputs
from bessemer.evaluation.names import TARGETS
from bessemer.evaluation.reconstruction import psnr, ssim
from bessemer.evaluation.records import weights_name
from bessemer.evaluation.sampling import draw_chunk, sampling_mode, to_uint8
from bessemer.evaluation.team import ALONE, Group, in_chunks
from bessemer.systems.contract import System

__all__ = ["TargetRecord", "check_targets", "evaluate_targets"]


def _l1(images: Tensor, originals: Tensor) -> Tensor:
    """[N] mean absolute difference of uint8 images, as shares of 255."""
    return (images.double() - originals.double()).abs().flatten(1).mean(1) / 255


_COMPUTE: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {"l1": _l1, "psnr": psnr, "ssim": ssim}


@dataclass(frozen=True)
class TargetRecord:
    """One metric of one set of weights over pairs. Comparable when all but the value's own fields agree."""

    metric: str
    """A key of :data:`bessemer.evaluation.names.TARGETS`."""
    value: float
    """Mean over the pairs; of `psnr`, over those whose output differs from the target."""
    standard_error: float
    """Standard error of `value`, over pairs."""
    higher_is_better: bool
    """Whether more is better."""
    estimator: str
    """Settings of the computation."""
    samples: int
    """Pairs."""
    reference_hash: str
    """Names the pairs."""
    seed: int
    """Seed of what the translation draws."""
    weights: str
    """Which weights: the profile of the moving average."""
    weights_sha256: str
    """Hash of the snapshot's weights; empty where they were never written."""
    seconds: float
    """Wall time; the one field that varies between repeats."""

    def as_dict(self) -> dict[str, Any]:
        """The record as the journal keeps it."""
        return asdict(self)


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


def evaluate_targets(
    system: System,
    info: Any,
    dataset: RealImages,
    metrics: Sequence[str],
    *,
    samples: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
) -> list[TargetRecord]:
    """Compare translations with targets. Called by all workers together.

    Args:
        system: with the weights to judge on `device`.
        info: origin of the weights, a :class:`bessemer.systems.snapshot.SnapshotInfo`.
        dataset: the pairs.
        metrics: keys of :data:`bessemer.evaluation.names.TARGETS`; without any nothing is done.
        samples: pairs, a fixed random choice; all where there are fewer.
        seed: of what the translation draws.
        device: of the system.
        group: this worker among the others.

    Returns:
        One record per metric on the first worker, nothing on the others.

    Raises:
        EvaluationError: the system or the data set has no targets, or an output is not finite.
        DataError: a pair cannot be read.
    """
    if not metrics:
        return []
    check_targets(system, metrics[0])
    started = time.perf_counter()
    inputs = Inputs(system, dataset, samples)

    def nearness(chunk: int, rows: slice) -> NDArray[np.float64]:
        drawn = draw_chunk(system, inputs.labels, chunk, seed=seed, truncation=None, device=device, inputs=inputs)
        targets = to_uint8(inputs.batch(rows, device)["targets"])
        values = [_COMPUTE[metric](to_uint8(drawn.nan_to_num()), targets) for metric in metrics]
        bad = ~drawn.isfinite().flatten(1).all(1)
        own: NDArray[np.float64] = torch.stack(values).masked_fill(bad, math.nan).cpu().numpy()
        return own

    with sampling_mode(system):
        every = in_chunks(len(inputs), nearness, group)
    if bad_count := int(np.isnan(every[0]).sum()):  # every worker raises, so none waits for another
        raise EvaluationError(
            f"translations: {bad_count} of {len(inputs)} hold NaN or infinity; the run has diverged. "
            "Resume from an earlier checkpoint with a lower learning rate."
        )
    if group.rank > 0:
        return []
    seconds = time.perf_counter() - started
    return [
        TargetRecord(
            metric=metric,
            value=mean,
            standard_error=error,
            higher_is_better=TARGETS[metric].higher_is_better,
            estimator=TARGETS[metric].estimator,
            samples=len(inputs),
            reference_hash=inputs.hash,
            seed=seed,
            weights=weights_name(info.ema),
            weights_sha256=info.weights_sha256,
            seconds=seconds,
        )
        for metric, (mean, error) in zip(metrics, map(_mean, every), strict=True)
    ]


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of the finite values, and its standard error."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return float(finite.mean()) if len(finite) else math.inf, math.nan
    return float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(len(finite)))
