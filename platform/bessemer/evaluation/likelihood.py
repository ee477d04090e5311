"""Likelihoods: how probable real images or sounds are under a system, in bits per dimension.

Samples are dealt to workers in chunks, and each chunk has its own random generator, so the value is the same on any
number of workers. BatchNorm statistics are those of training: this must come before a system prepares for sampling.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.data.reading.batches import as_numbers
from bessemer.errors import EvaluationError
from bessemer.evaluation.failures import not_finite
from bessemer.evaluation.records import weights_name
from bessemer.evaluation.reference import reference_ids
from bessemer.evaluation.sampling import sampling_mode
from bessemer.evaluation.team import ALONE, Group, Progress, in_chunks
from bessemer.systems.contract import Batch, System
from bessemer.systems.likelihood import LikelihoodSystem
from bessemer.training.rng import generator

__all__ = ["LikelihoodRecord", "evaluate_likelihood"]

_REMEDY = "Look at these samples of the data set: are they like those that are trained on?"


@dataclass(frozen=True)
class LikelihoodRecord:
    """Bits per dimension of one set of weights. Comparable when all but the value's own fields agree."""

    metric: str
    """A key of :data:`bessemer.evaluation.names.LIKELIHOODS`."""
    value: float
    """Mean over the samples; lower is better. Where the system has a bound only, the truth may be lower."""
    standard_error: float
    """Standard error of `value`, over samples."""
    samples: int
    """Images, or pieces of sound, whose likelihood was taken."""
    importance_samples: int
    """Draws of the latents per image."""
    reference_hash: str
    """Names the images and the estimator."""
    preprocessing: str
    """What the images are made into before, and by how many draws the bound is estimated."""
    seed: int
    """Seed of the latents."""
    weights: str
    """Which weights: the profile of the moving average."""
    weights_sha256: str
    """Hash of the snapshot's weights; empty where they were never written."""
    seconds: float
    """Wall time; the one field that varies between repeats."""

    def as_dict(self) -> dict[str, Any]:
        """The record as the journal keeps it."""
        return asdict(self)


def evaluate_likelihood(
    system: System,
    info: Any,
    dataset: Any,
    metrics: Sequence[str],
    *,
    samples: int,
    importance_samples: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    progress: Progress | None = None,
) -> list[LikelihoodRecord]:
    """Bits per dimension of real samples: per colour value, or per sample of sound. Called by all workers together.

    Args:
        system: with the weights to judge on `device`.
        info: origin of the weights, a :class:`bessemer.systems.snapshot.SnapshotInfo`.
        dataset: the images, a :class:`bessemer.data.reading.dataset.ShardedDataset`.
        metrics: keys of :data:`bessemer.evaluation.names.LIKELIHOODS`; without any nothing is done.
        samples: images, a fixed random choice; all where there are fewer.
        importance_samples: draws of the latents per image.
        seed: seed of the latents.
        device: of the system.
        group: this worker among the others.
        progress: called after every chunk.

    Returns:
        One record per metric on the first worker, nothing on the others.

    Raises:
        EvaluationError: the system has no likelihood, or it is not finite, or the data set has other fields.
        DataError: a sample cannot be read.
    """
    if not metrics:
        return []
    if not isinstance(system, LikelihoodSystem):
        raise EvaluationError(f"evaluation.metrics: {metrics[0]} needs a likelihood, and {system.name} has none.")
    started = time.perf_counter()
    ids = reference_ids(len(dataset), samples)
    labels = np.asarray(dataset.labels)[ids]

    def nats(chunk: int, rows: slice) -> NDArray[np.float64]:
        batch = _batch(system, dataset.read_fields(ids[rows]), labels[rows], device)
        found = system.log_likelihood(batch, generator(device, seed, "likelihood", chunk), importance_samples)
        own: NDArray[np.float64] = found.double().cpu().numpy()
        return own

    with torch.no_grad(), sampling_mode(system):
        values = in_chunks(len(ids), nats, group, partial(progress or (lambda *_: None), "likelihoods"))
    if bad := np.flatnonzero(~np.isfinite(values)).tolist():  # every worker raises, so none waits for another
        raise not_finite(system, "likelihoods", [int(ids[i]) for i in bad], len(values), _REMEDY)
    if group.rank > 0:
        return []
    bits = -values / (math.log(2) * math.prod(system.sample_shape))
    facts = {"data": dataset.manifest.hash, "count": len(ids), "importance_samples": importance_samples}
    return [
        LikelihoodRecord(
            metric=metric,
            value=float(bits.mean()),
            standard_error=float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else float("nan"),
            samples=len(ids),
            importance_samples=importance_samples,
            reference_hash=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
            preprocessing=f"{system.likelihood_protocol}, {importance_samples} importance samples",
            seed=seed,
            weights=weights_name(info.ema),
            weights_sha256=info.weights_sha256,
            seconds=time.perf_counter() - started,
        )
        for metric in metrics
    ]


def _batch(
    system: System, stored: Mapping[str, NDArray[Any]], labels: NDArray[np.int64], device: torch.device | str
) -> Batch:
    """Samples as training hands them to a system.

    Raises:
        EvaluationError: they are none that the system takes.
    """
    found, wanted = {name: values.shape[1:] for name, values in stored.items()}, dict(system.batch_shapes)
    if found != wanted:
        raise EvaluationError(f"likelihoods: the data set has {found}, and {system.name} takes {wanted}; name another.")
    numbers = {name: as_numbers(name, torch.from_numpy(values).to(device)) for name, values in stored.items()}
    return Batch(None, torch.from_numpy(labels).to(device), **numbers)
