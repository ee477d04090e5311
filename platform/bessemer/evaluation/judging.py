"""All metrics of one set of weights: of real images that it is asked about, and of what it draws."""

from __future__ import annotations

from typing import Any

import torch

from bessemer.evaluation.evaluate import evaluate_system
from bessemer.evaluation.failures import noted
from bessemer.evaluation.images import RealImages
from bessemer.evaluation.likelihood import LikelihoodRecord, evaluate_likelihood
from bessemer.evaluation.names import SplitMetrics
from bessemer.evaluation.records import EvaluationRecord, SampledWeights
from bessemer.evaluation.team import ALONE, Group, Progress
from bessemer.systems.contract import System

__all__ = ["judge_weights"]


def judge_weights(
    system: System,
    info: SampledWeights,
    dataset: RealImages,
    held_out: RealImages,
    metrics: SplitMetrics,
    failures: list[str],
    *,
    samples: int,
    importance_samples: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    progress: Progress | None = None,
    **drawing: Any,
) -> list[LikelihoodRecord | EvaluationRecord]:
    """Judge weights; where a part cannot be computed, the others still count. Called by all workers together.

    Args:
        system, info: the weights, as for :func:`bessemer.evaluation.evaluate.evaluate_system`.
        dataset: real images that samples are compared with.
        held_out: those whose likelihood is taken, and that translations and classifiers begin with.
        metrics: what is asked for.
        failures: gets what the parts that failed say, on all workers alike.
        samples, seed, device, group, progress: as for both parts.
        importance_samples: draws of the latents per image of a likelihood.
        drawing: further arguments of :func:`bessemer.evaluation.evaluate.evaluate_system`.

    Returns:
        The records, on the first worker.
    """
    records: list[LikelihoodRecord | EvaluationRecord] = []
    common: dict[str, Any] = {"samples": samples, "seed": seed, "device": device, "group": group, "progress": progress}
    with noted(failures):  # first: sampling renews BatchNorm statistics
        records += evaluate_likelihood(
            system, info, held_out, metrics.likelihoods, importance_samples=importance_samples, **common
        )
    with noted(failures):
        records += evaluate_system(system, info, dataset, metrics.drawn, held_out=held_out, **common, **drawing)
    return records
