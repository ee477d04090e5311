"""The evaluator: compares images, of a system or of others, with real ones, and says by which protocol.

Work is dealt to workers in fixed batches of whole chunks, and each chunk has its own random generator. So the
images, their features and the values are the same on any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.errors import EvaluationError
from bessemer.evaluation.compute import Comparison, FeatureSet, Value
from bessemer.evaluation.extractors import Extractor, get_extractor
from bessemer.evaluation.failures import not_finite
from bessemer.evaluation.images import RealImages, field_images
from bessemer.evaluation.inputs import Inputs, inputs_for
from bessemer.evaluation.metrics import Gaussian
from bessemer.evaluation.names import CLIP_KINDS, HELD_OUT_KINDS, KINDS, TARGETS, Metric, MetricKind, parse_metric
from bessemer.evaluation.paths import check_walkable, evaluate_paths
from bessemer.evaluation.records import EvaluationRecord, SampledWeights, weights_name
from bessemer.evaluation.reference import Reference, joined, reference_features, reference_hash
from bessemer.evaluation.sampling import SAMPLE_CHUNK, allocate_labels, draw_chunk, prepare, sampling_mode, to_uint8
from bessemer.evaluation.targets import check_targets, nearness, records_of_pairs
from bessemer.evaluation.team import ALONE, Features, Group, Moments, Progress, Team
from bessemer.systems.contract import System

__all__ = ["Balance", "EvaluationRecord", "compare_images", "evaluate_system", "sampled_counts"]

Balance = Literal["data", "uniform"]

_REMEDY = (
    "Latents nearer to the mean help (evaluation.truncation, such as 0.7), and with a flow couplings of bounded scale "
    "(glow's least_scale)."
)


def evaluate_system(
    system: System,
    info: SampledWeights,
    dataset: RealImages,
    metrics: Sequence[str],
    *,
    samples: int,
    real: int | None = None,
    held_out: RealImages | None = None,
    balance: Balance = "data",
    batch_size: int = 50,
    seed: int = 0,
    truncation: float | None = None,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[EvaluationRecord]:
    """Compute metrics of the system's images against a data set. Called by all workers together.

    Args:
        system: with the weights to sample on `device`. Its standing statistics are renewed for `truncation`, and
            stay so; the mode of its modules is restored.
        info: classes and origin of the weights.
        dataset: the real images.
        metrics: names, see :data:`bessemer.evaluation.names.METRICS`, and those of translated pairs in
            :data:`bessemer.evaluation.names.TARGETS`; the records come in this order.
        samples: images to generate; of a translation, at most as many as there are inputs.
        real: real images to compare with; as many as `samples` if not given, and all of them for `memorised`. Where
            there are fewer, all.
        held_out: real images that the classifiers of `cas` are asked about, and that translations begin with; those of
            `dataset` if not given.
        balance: labels of the generated images, in the proportions of the data set or the same number of each class.
        batch_size: images per forward pass of an extractor; taken in whole chunks of 32 when larger than that.
        seed: seed of the latents.
        truncation: truncation of the latents; ``None`` for none.
        device: device of the system and the extractors.
        group: this worker among the others.
        cache_dir: directory of reference features; ``<BESSEMER_CACHE or ~/.cache/bessemer>/reference`` if not given.
        progress: called after every batch.

    Returns:
        One record per metric on the first worker, nothing on the others.

    Raises:
        EvaluationError: unknown metric, missing extractor, images that are not finite, too few images, or a metric
            that the system cannot have: a path length without latents, pairs without targets.
        DataError: a real image cannot be read.
    """
    started = time.perf_counter()
    _check_counts(samples, len(dataset))
    paired, others = ([name for name in metrics if (name in TARGETS) is near] for near in (True, False))
    walked, compared = ([name for name in others if parse_metric(name).is_path is paths] for paths in (True, False))
    for name in walked:  # before the long work of the other metrics
        check_walkable(system, name)
    for name in paired:
        check_targets(system, name)
    plan = _plan(compared, device, samples, real)
    if not metrics:
        return []
    team = Team(group, batch_size, progress or (lambda *_: None))
    inputs, counts = inputs_for(system, held_out or dataset, samples), sampled_counts(info.class_counts, balance)
    labels = allocate_labels(counts, samples) if inputs is None else inputs.labels
    if inputs is not None:
        samples = len(inputs)
        dataset, held_out = (field_images(s, system.sample_field) for s in (dataset, held_out or dataset))
    references = _references(plan, dataset, held_out or dataset, cache_dir, team)
    facts = {
        "samples": samples,
        "seed": seed,
        "truncation": truncation,
        "balance": balance if inputs is None else f"inputs {inputs.hash[:16]}",
        "weights": weights_name(info.ema),
        "weights_sha256": info.weights_sha256,
    }
    records = []
    if walked:  # first: paths are walked without truncation, and standing statistics stay those of the samples
        prepare(system, counts, seed=seed, truncation=None, device=device)
        records += evaluate_paths(system, walked, labels, seed=seed, device=device, team=team, facts=facts)
    if compared or paired:
        sides = {name: _Side.begin(plan, name, samples, references, device) for name in plan.extractors}
        prepare(system, counts, seed=seed, truncation=truncation, device=device)
        near = _generate(system, labels, inputs, paired, sides.values(), (seed, truncation), device, team)
        for side in sides.values():
            side.finish(samples, team)
        if group.rank == 0:
            ids, classes = np.arange(samples), tuple(info.class_names)
            found = {name: side.result(ids, labels, classes) for name, side in sides.items()}
            records += _records(plan, found, references, facts, device, started)
            if inputs is not None:
                records += records_of_pairs(paired, near, inputs, facts, started)
    return sorted(records, key=lambda record: list(metrics).index(record.metric))


def compare_images(
    images: RealImages,
    dataset: RealImages,
    metrics: Sequence[str],
    *,
    samples: int | None = None,
    real: int | None = None,
    batch_size: int = 50,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[EvaluationRecord]:
    """Compute metrics of images that others made against real ones; features of both sets are kept for the next time.

    Args:
        images: the images to judge.
        dataset: the real images.
        metrics: names, see :data:`bessemer.evaluation.names.METRICS`; the records come in this order.
        samples: images of `images` to take, a fixed random choice; all if not given.
        real: real images to take, likewise.
        batch_size, device, group, cache_dir, progress: as for :func:`evaluate_system`.

    Returns:
        One record per metric on the first worker, nothing on the others.

    Raises:
        EvaluationError: unknown metric, missing extractor, too few images.
        DataError: an image cannot be read.
    """
    started = time.perf_counter()
    count = min(samples or len(images), len(images))
    _check_counts(count, len(dataset))
    plan = _plan(metrics, device, len(dataset), real)
    if not plan.wanted:
        return []
    team = Team(group, batch_size, progress or (lambda *_: None))
    found: dict[str, FeatureSet | Moments] = {
        name: reference_features(images, extractor, count, cache_dir, team).features
        for name, extractor in plan.extractors.items()
    }
    references = _references(plan, dataset, dataset, cache_dir, team)
    if group.rank > 0:
        return []
    facts = {
        "samples": count,
        "seed": None,
        "truncation": None,
        "balance": "given",
        "weights": "images",
        "weights_sha256": images.manifest.hash,
    }
    return _records(plan, found, references, facts, device, started)


def sampled_counts(class_counts: Sequence[int], balance: Balance) -> list[int]:
    """Proportions of the classes among generated images."""
    return list(class_counts) if balance == "data" else [1] * len(class_counts)


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    wanted: dict[str, Metric]
    extractors: dict[str, Extractor]
    real: int
    """Real images to compare with, at most."""
    real_is_asked: bool

    def kinds(self, extractor: str) -> set[MetricKind]:
        """What is wanted of an extractor's features."""
        return {metric.kind for metric in self.wanted.values() if metric.extractor == extractor}

    def real_count(self, kind: MetricKind, images: int) -> int:
        """Real images that a kind of metric takes of `images`: copies are looked for among all of them."""
        return images if kind == "memorised" and not self.real_is_asked else min(self.real, images)


@dataclass(frozen=True)
class _References:
    """Features of the real images, by extractor."""

    compared: Mapping[str, Reference]
    held_out: Mapping[str, Reference]
    """Those that classifiers are asked about."""

    def of(self, metric: Metric) -> Reference:
        """What a metric needs."""
        return (self.held_out if metric.kind in HELD_OUT_KINDS else self.compared)[metric.extractor]


def _references(
    plan: _Plan, dataset: RealImages, held_out: RealImages, cache_dir: Path | None, team: Team
) -> _References:
    def features(images: RealImages, *, held: bool) -> dict[str, Reference]:
        found = {}
        for name, extractor in plan.extractors.items():
            counts = [
                plan.real_count(kind, len(images)) for kind in plan.kinds(name) if (kind in HELD_OUT_KINDS) == held
            ]
            if counts:
                found[name] = reference_features(images, extractor, max(counts), cache_dir, team)
        return found

    found = _References(features(dataset, held=False), features(held_out, held=True))
    for name, metric in plan.wanted.items():
        of_clips = found.of(metric).features.frames > 1
        if of_clips != (metric.kind in CLIP_KINDS):
            have, instead = ("clips", f"fdframes_{metric.extractor} or fdsteps") if of_clips else ("images", "fd")
            raise EvaluationError(f"metric {name}: the data set holds {have}; use {instead}_{metric.extractor}.")
    return found


def _plan(metrics: Sequence[str], device: torch.device | str, default: int, real: int | None) -> _Plan:
    wanted = {name: parse_metric(name) for name in metrics}
    if path := next((name for name, metric in wanted.items() if metric.is_path), None):
        raise EvaluationError(f"metric {path}: walks a system's latents, and images have none; leave it out.")
    names = dict.fromkeys(metric.extractor for metric in wanted.values())
    extractors: dict[str, Extractor] = {name: get_extractor(name, device) for name in names}
    return _Plan(wanted, extractors, default if real is None else real, real is not None)


def _check_counts(samples: int, real: int) -> None:
    if min(samples, real) < 2:
        raise EvaluationError(f"samples: {samples} generated and {real} real images, but a distance needs 2 of each.")


@dataclass
class _Side:
    """Features of generated images by one extractor: all of them, or their sums where no metric needs more."""

    extractor: Extractor
    own: list[Features]
    moments: Moments | None
    features: Features | None = None

    @classmethod
    def begin(cls, plan: _Plan, name: str, samples: int, references: _References, device: torch.device | str) -> _Side:
        extractor = plan.extractors[name]
        d = extractor.dimension
        # With no more images than dimensions the distance is computed from the images themselves.
        if plan.kinds(name) <= {"fd"} and min(samples, len((reference := references.compared[name]).features)) > d:
            mean = reference.features.features.mean(axis=0, dtype=np.float64)
            return cls(extractor, [], Moments(mean, device))
        return cls(extractor, [], None)

    def add(self, features: torch.Tensor) -> None:
        if self.moments is not None:
            self.moments.add(features)
        else:
            self.own.append(features.cpu().numpy())

    def result(self, ids: Any, labels: Any, classes: tuple[str, ...]) -> FeatureSet | Moments:
        """What came together."""
        if self.moments is not None:
            return self.moments
        assert self.features is not None
        frames = self.features.shape[1] // self.extractor.dimension
        return FeatureSet(self.features, ids, labels, classes, frames)

    def finish(self, samples: int, team: Team) -> None:
        """Bring the workers' shares together."""
        if self.moments is not None:
            team.group.sum(self.moments.sums)
        else:
            own = joined(self.own, self.extractor.dimension)
            self.features = team.join(samples, team.group.gather(own))
        self.own = []


def _generate(
    system: System,
    labels: Any,
    inputs: Inputs | None,
    paired: Sequence[str],
    sides: Iterable[_Side],
    protocol: tuple[int, float | None],
    device: torch.device | str,
    team: Team,
) -> NDArray[np.float64]:
    """Draw this worker's images, each once, and hand their features to `sides`.

    Returns:
        [all samples, paired] how near they come to the targets of their inputs.
    """
    (seed, truncation), samples = protocol, len(labels)
    bad, near = list[int](), [np.empty((0, len(paired)))]
    with sampling_mode(system):
        for batch in team.counted_batches("generated images", samples):
            chunks = range(batch.start // SAMPLE_CHUNK, -(-batch.stop // SAMPLE_CHUNK))
            draw = partial(draw_chunk, system, labels, seed=seed, truncation=truncation, device=device, inputs=inputs)
            images = torch.cat([draw(chunk) for chunk in chunks])
            bad += [batch[i] for i in torch.nonzero(~images.isfinite().flatten(1).all(1)).flatten().tolist()]
            pixels = to_uint8(images.nan_to_num())
            if paired and inputs is not None:
                near.append(nearness(paired, pixels, inputs, slice(batch.start, batch.stop)))
            for side in sides:
                side.add(team.features(side.extractor, pixels))
    if every := [number for part in team.group.gather(bad) for number in part]:  # every worker raises: none waits
        raise not_finite(system, "generated images", every, samples, _REMEDY)
    return team.join(samples, team.group.gather(np.concatenate(near)))


def _records(
    plan: _Plan,
    generated: Mapping[str, FeatureSet | Moments],
    references: _References,
    facts: Mapping[str, Any],
    device: torch.device | str,
    started: float,
) -> list[EvaluationRecord]:
    comparisons: dict[tuple[str, int, bool], Comparison] = {}
    values: list[tuple[Value, int]] = []
    for metric in plan.wanted.values():
        reference, own = references.of(metric), generated[metric.extractor]
        real = reference.part(plan.real_count(metric.kind, reference.images))
        if isinstance(own, Moments):
            distance = own.gaussian().distance(Gaussian.fitted(real.features.astype(np.float64)))
            values.append((Value(distance), len(real)))
            continue
        key = (metric.extractor, len(real), metric.kind in HELD_OUT_KINDS)
        if key not in comparisons:
            comparisons[key] = Comparison(own, real, reference.extractor.head, facts["seed"] or 0, device)
        values.append((comparisons[key].value(metric.kind), len(real)))
    seconds = time.perf_counter() - started
    return [
        EvaluationRecord(
            metric=name,
            value=found.value,
            standard_error=found.standard_error,
            higher_is_better=metric.higher_is_better,
            estimator=KINDS[metric.kind].estimator,
            reference_samples=count,
            reference_hash=reference_hash(references.of(metric).data_hash, plan.extractors[metric.extractor], count),
            extractor=metric.extractor,
            extractor_sha256=plan.extractors[metric.extractor].weights_sha256,
            preprocessing=plan.extractors[metric.extractor].preprocessing,
            details=found.details,
            seconds=seconds,
            **facts,
        )
        for (name, metric), (found, count) in zip(plan.wanted.items(), values, strict=True)
    ]
