"""Learning rate as a function of the image clock, so that resuming needs no state."""

from __future__ import annotations

import math

from bessemer.spec.job import TrainingSpec

__all__ = ["lr_factor"]


def lr_factor(training: TrainingSpec, nimg: int) -> float:
    """What every network's learning rate is multiplied by in the step that starts at image `nimg`.

    The product of three: the batch-size rule (linear: Goyal et al. 2017, arXiv:1706.02677; sqrt: Krizhevsky 2014,
    arXiv:1404.5997), the linear warm-up, which ends at 1, and the decay from its end, or ``decay_from_kimg``, to
    ``total_kimg`` (cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5 without restarts).
    """
    schedule, total = training.lr_schedule, training.total_kimg * 1000
    warmup = schedule.warmup_kimg * 1000
    factor = 1.0
    if training.lr_scaling != "none":
        assert training.lr_reference_batch is not None
        ratio = training.batch_size / training.lr_reference_batch
        factor = ratio if training.lr_scaling == "linear" else math.sqrt(ratio)
    # By the end of the step: the first one would stand still otherwise.
    if (seen := nimg + training.batch_size) < warmup:
        factor *= seen / warmup
    elif schedule.decay != "none":
        start = warmup if schedule.decay_from_kimg is None else schedule.decay_from_kimg * 1000
        progress = min(max(nimg - start, 0) / (total - start), 1.0)
        left = 1 - progress if schedule.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        factor *= schedule.final + (1 - schedule.final) * left
    return factor
