"""The evaluator: samples a system, compares its images with real ones, and says by which protocol.

Work is dealt to workers in fixed batches of whole chunks, and each chunk has its own random generator. So the
images, their features and the values are the same on any number of workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import Extractor, get_extractor
from bessemer.evaluation.files import cache_dir as default_cache_dir
from bessemer.evaluation.metrics import frechet_distance, kernel_distance
from bessemer.evaluation.names import parse_metric
from bessemer.evaluation.records import EvaluationRecord
from bessemer.evaluation.reference import (
    RealImages,
    load_reference,
    reference_hash,
    reference_ids,
    reference_path,
    save_reference,
)
from bessemer.evaluation.sampling import SAMPLE_CHUNK, allocate_labels, draw_chunk, prepare, sampling_mode, to_uint8
from bessemer.systems.contract import System

__all__ = ["EvaluationRecord", "Gather", "Progress", "SampledWeights", "evaluate_system"]

Features = NDArray[np.float32]
Gather = Callable[[Any], list[Any]]
"""Every worker's value, by rank, on every worker."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, the images done and all images; on each worker for its own share."""

_log = logging.getLogger(__name__)


class SampledWeights(Protocol):
    """What evaluation asks about the weights; :class:`bessemer.systems.snapshot.SnapshotInfo` has it."""

    @property
    def class_counts(self) -> Sequence[int]:
        """Training images of each class; labels are drawn in these proportions."""

    @property
    def ema(self) -> Mapping[str, Any]:
        """Profile of the moving average."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights file; empty for weights that were never written."""


def evaluate_system(
    system: System,
    info: SampledWeights,
    dataset: RealImages,
    metrics: Sequence[str],
    *,
    samples: int,
    batch_size: int = 50,
    seed: int = 0,
    truncation: float | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    gather: Gather | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[EvaluationRecord]:
    """Compute metrics of the system's images against a data set. Called by all workers together.

    Args:
        system: with the weights to sample on `device`. Its standing statistics are renewed for `truncation`, and
            stay so; the mode of its modules is restored.
        info: classes and origin of the weights.
        dataset: the real images; as many as `samples` are used, or all where there are fewer.
        metrics: names, see :data:`bessemer.evaluation.names.METRICS`; the records come in this order.
        samples: images to generate.
        batch_size: images per forward pass of an extractor; taken in whole chunks of 32 when larger than that.
        seed: seed of the latents.
        truncation: truncation of the latents; ``None`` for none.
        device: device of the system and the extractors.
        rank: this worker, from 0.
        world: number of workers.
        gather: collects a value from every worker; needed when `world` is more than 1.
        cache_dir: directory of reference features; ``<BESSEMER_CACHE or ~/.cache/bessemer>/reference`` if not given.
        progress: called after every batch.

    Returns:
        One record per metric on the first worker, nothing on the others.

    Raises:
        EvaluationError: unknown metric, missing extractor, images that are not finite, too few images.
        DataError: a real image cannot be read.
    """
    started = time.perf_counter()
    assert world == 1 or gather is not None, "several workers need `gather`"
    wanted = {name: parse_metric(name) for name in metrics}
    if not wanted:
        return []
    if min(samples, len(dataset)) < 2:
        raise EvaluationError(
            f"samples: {samples} generated and {len(dataset)} real images, but a distance needs 2 of each."
        )
    names: list[str] = list(dict.fromkeys(metric.extractor for metric in wanted.values()))
    extractors = {name: get_extractor(name, device) for name in names}
    team = _Team(rank, world, batch_size, gather or (lambda value: [value]), progress or (lambda *_: None))
    directory = cache_dir or default_cache_dir() / "reference"
    count = min(samples, len(dataset))
    hashes = {name: reference_hash(dataset.manifest.hash, e, count) for name, e in extractors.items()}
    real = {name: _real(dataset, e, count, directory, hashes[name], team) for name, e in extractors.items()}
    fake = _generated(system, info, extractors, samples, seed, truncation, device, team)
    if rank > 0:
        return []
    values: list[tuple[float, float | None]] = []
    for metric in wanted.values():
        pair = fake[metric.extractor], real[metric.extractor]
        values.append((frechet_distance(*pair), None) if metric.kind == "frechet" else kernel_distance(*pair))
    seconds = time.perf_counter() - started
    profile = " ".join(f"{key}={value}" for key, value in sorted(info.ema.items()))
    return [
        EvaluationRecord(
            metric=name,
            value=value,
            standard_error=error,
            samples=samples,
            reference_samples=len(real[metric.extractor]),
            reference_hash=hashes[metric.extractor],
            extractor=metric.extractor,
            extractor_sha256=extractors[metric.extractor].weights_sha256,
            preprocessing=extractors[metric.extractor].preprocessing,
            seed=seed,
            truncation=truncation,
            weights=f"ema {profile}".strip(),
            weights_sha256=info.weights_sha256,
            seconds=seconds,
        )
        for (name, metric), (value, error) in zip(wanted.items(), values, strict=True)
    ]


@dataclass(frozen=True)
class _Team:
    """This worker among the others, and how work is dealt: in batches of whole chunks, like cards."""

    rank: int
    world: int
    batch_size: int
    gather: Gather
    progress: Progress

    def batches(self, total: int, rank: int | None = None) -> Iterator[range]:
        """Image numbers of each batch of this worker, or of another, for `total` images."""
        size = max(self.batch_size // SAMPLE_CHUNK, 1) * SAMPLE_CHUNK
        first = (self.rank if rank is None else rank) * size
        for start in range(first, total, self.world * size):
            yield range(start, min(start + size, total))

    def counted_batches(self, what: str, total: int) -> Iterator[range]:
        """This worker's batches, with progress reported after each."""
        own = list(self.batches(total))
        images = sum(map(len, own))
        done = 0
        for batch in own:
            yield batch
            done += len(batch)
            self.progress(what, done, images)

    def features(self, extractor: Extractor, images: torch.Tensor) -> Features:
        """Features of one batch, in as many forward passes as the batch size asks for."""
        passes = torch.split(images, max(self.batch_size, 1)) if self.batch_size < SAMPLE_CHUNK else (images,)
        return np.concatenate([extractor.features(part).cpu().numpy() for part in passes])

    def join(self, total: int, parts: Sequence[Features]) -> Features:
        """The workers' features, each in the order of its batches, in the order of the images."""
        whole = np.empty((total, parts[0].shape[1]), dtype=np.float32)
        for rank, part in enumerate(parts):
            ids = np.concatenate([np.empty(0, dtype=np.int64), *self.batches(total, rank)])
            whole[ids.astype(np.int64)] = part
        return whole


def _real(dataset: RealImages, extractor: Extractor, count: int, directory: Path, key: str, team: _Team) -> Features:
    """Features of the real images, from the cache if every worker finds them there."""
    path = reference_path(directory, extractor, key)
    kept = load_reference(path, key, (count, extractor.dimension))
    if all(team.gather(kept is not None)) and kept is not None:
        return kept
    ids = reference_ids(len(dataset), count)
    own = [
        team.features(extractor, torch.from_numpy(dataset.read(ids[batch.start : batch.stop])))
        for batch in team.counted_batches(f"real images, {extractor.name}", count)
    ]
    nothing = np.empty((0, extractor.dimension), dtype=np.float32)  # a worker may have no batch
    features = team.join(count, team.gather(np.concatenate([nothing, *own])))
    if kept is None:
        try:
            save_reference(path, key, features)
        except OSError as e:
            _log.warning("reference features are computed again next time: %s cannot be written (%s)", path, e)
    return features


def _generated(
    system: System,
    info: SampledWeights,
    extractors: Mapping[str, Extractor],
    samples: int,
    seed: int,
    truncation: float | None,
    device: torch.device | str,
    team: _Team,
) -> dict[str, Features]:
    """Features of the generated images, by extractor."""
    labels = allocate_labels(info.class_counts, samples)
    own = {name: [np.empty((0, e.dimension), dtype=np.float32)] for name, e in extractors.items()}
    bad = 0
    prepare(system, info.class_counts, seed=seed, truncation=truncation, device=device)
    with sampling_mode(system):
        for batch in team.counted_batches("generated images", samples):
            chunks = range(batch.start // SAMPLE_CHUNK, -(-batch.stop // SAMPLE_CHUNK))
            images = torch.cat(
                [draw_chunk(system, labels, c, seed=seed, truncation=truncation, device=device) for c in chunks]
            )
            bad += int((~images.isfinite()).flatten(1).any(1).sum())
            for name, extractor in extractors.items():
                own[name].append(team.features(extractor, to_uint8(images.nan_to_num())))
    gathered = team.gather((bad, {name: np.concatenate(parts) for name, parts in own.items()}))
    if bad := sum(part[0] for part in gathered):  # every worker raises, so none waits for another
        raise EvaluationError(
            f"generated images: {bad} of {samples} hold NaN or infinity; the run has diverged. "
            "Resume from an earlier checkpoint with a lower learning rate."
        )
    return {name: team.join(samples, [part[1][name] for part in gathered]) for name in extractors}
