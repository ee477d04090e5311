"""Perceptual path length: how much images change along paths through the latents, by steps too small to see.

Karras et al., A Style-Based Generator Architecture for Generative Adversarial Networks, CVPR 2019, arXiv:1812.04948,
section 4.1 and appendix C: ``E[d(G(p(t)), G(p(t + eps))) / eps^2]`` with eps = 1e-4, over the paths p between two
random latents: great circles in z, straight lines in w, at a random t (`full`) or at t = 0 (`end`). The distance d is
LPIPS, or the squared distance of another extractor's features; the metric's name says which, as values do not compare.

Images are not rounded to 8 bits, which would hide so small a step. Where the paper cuts faces out, `-face` does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import Extractor, get_extractor
from bessemer.evaluation.failures import not_finite
from bessemer.evaluation.lpips import Lpips
from bessemer.evaluation.metrics import Estimate
from bessemer.evaluation.names import KINDS, Metric, parse_metric
from bessemer.evaluation.records import EvaluationRecord
from bessemer.evaluation.sampling import SAMPLE_CHUNK, sampling_mode
from bessemer.evaluation.team import Team
from bessemer.systems.contract import System
from bessemer.training.rng import generator

__all__ = ["EPSILON", "check_walkable", "evaluate_paths", "mean_length", "shrink_for_distance", "slerp", "step"]

EPSILON: Final = 1e-4
_EDGE: Final = 256
_PERCENT: Final = (1.0, 99.0)
_REMEDY: Final = "Leave this metric out, or bound what the system computes from latents far from the mean."


def check_walkable(system: System, metric: str) -> None:
    """Refuse a path length where the system has no latents, or none that it maps.

    Raises:
        EvaluationError: it has not, or does not draw images.
    """
    kind = parse_metric(metric).kind
    if len(system.sample_shape) != 3:
        raise EvaluationError(f"metric {metric}: is of images, and {system.name} draws {system.sample_field}.")
    if not system.latent_shapes:
        raise EvaluationError(f"metric {metric}: {system.name} draws step by step; it has no latents to walk between.")
    if kind.startswith("ppl-w") and type(system).styles is System.styles:
        instead = metric.replace("ppl-w", "ppl-z")
        raise EvaluationError(f"metric {metric}: {system.name} has no w, to which z is mapped; use {instead}.")


def evaluate_paths(
    system: System,
    metrics: Sequence[str],
    labels: NDArray[np.int64],
    *,
    seed: int,
    device: torch.device | str,
    team: Team,
    facts: Mapping[str, Any],
) -> list[EvaluationRecord]:
    """Path lengths. Called by all workers together; the same on any number of them.

    Args:
        system: with the weights to walk, prepared for sampling.
        metrics: names of path lengths.
        labels: [n] class of each path, the same at both of its ends.
        seed: of the latents.
        device: of the system.
        team: the workers.
        facts: fields of the records that do not depend on the metric.

    Returns:
        One record per metric on the first worker, nothing on the others.

    Raises:
        EvaluationError: an extractor is missing, or images are not finite.
    """
    started = time.perf_counter()
    wanted = {name: _Walk.of(parse_metric(name), device) for name in metrics}
    own: dict[str, list[NDArray[np.float64]]] = {name: [np.empty((0, 1))] for name in metrics}
    for space, full in dict.fromkeys((walk.space, walk.full) for walk in wanted.values()):
        walks = {name: walk for name, walk in wanted.items() if (walk.space, walk.full) == (space, full)}
        shown = f"paths in {space}, {'full' if full else 'ends'}"
        for batch in team.counted_batches(shown, len(labels)):
            for chunk in range(batch.start // SAMPLE_CHUNK, -(-batch.stop // SAMPLE_CHUNK)):
                pair = step(system, labels, chunk, space=space, full=full, seed=seed, device=device)
                for name, walk in walks.items():
                    own[name].append(walk.lengths(*pair)[:, None])
    records = []
    for name, walk in wanted.items():
        lengths = team.join(len(labels), team.group.gather(np.concatenate(own[name])))[:, 0]
        if bad := np.flatnonzero(~np.isfinite(lengths)).tolist():  # every worker raises, so none waits for another
            raise not_finite(system, f"metric {name}: steps along paths", bad, len(labels), _REMEDY)
        found = mean_length(lengths)
        records.append(
            EvaluationRecord(
                metric=name,
                value=found.value,
                standard_error=found.standard_error,
                higher_is_better=False,
                estimator=KINDS[walk.metric.kind].estimator,
                reference_samples=0,
                reference_hash="",
                extractor=walk.extractor.name,
                extractor_sha256=walk.extractor.weights_sha256,
                preprocessing=walk.extractor.preprocessing,
                details={},
                seconds=time.perf_counter() - started,
                **{**facts, "truncation": None},
            )
        )
    return records if team.group.rank == 0 else []


def step(
    system: System,
    labels: NDArray[np.int64],
    chunk: int,
    *,
    space: str,
    full: bool,
    seed: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Images before and after a step along the paths of one chunk: two of [<=32, C, H, W] float32 of 0 to 255.

    The same chunk has the same ends, noise and t in both spaces. Latents are never truncated.
    """
    own = torch.from_numpy(labels[chunk * SAMPLE_CHUNK : (chunk + 1) * SAMPLE_CHUNK]).to(device)
    draws = generator(device, seed, "path", chunk)
    shapes = dict(system.latent_shapes)
    walked = next(iter(shapes))
    a = {name: torch.randn(len(own), *shape, generator=draws, device=device) for name, shape in shapes.items()}
    b = {**a, walked: torch.randn(len(own), *shapes[walked], generator=draws, device=device)}
    t = torch.rand(len(own), generator=draws, device=device) * full
    with torch.no_grad(), sampling_mode(system):
        if space == "w":
            a, b = _styles(system, a, own), _styles(system, b, own)
            walked = next(iter(a))
        mix = slerp if space == "z" else _lerp
        ends = [mix(a[walked].double(), b[walked].double(), s).float() for s in (t.double(), t.double() + EPSILON)]
        both = {name: torch.cat([tensor, tensor]) for name, tensor in a.items()} | {walked: torch.cat(ends)}
        images = system.generate(both, torch.cat([own, own]))
    first, second = images.float().add(1).mul(127.5).clamp(0, 255).chunk(2)
    return first, second


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points [N, ...] on the arcs from `a` to `b` at `t` [N]; their lengths change evenly from that of a to that of b.

    Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985.
    """
    shape, (a, b), t = a.shape, (a.flatten(1), b.flatten(1)), t[:, None]
    size_a, size_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit = a / size_a
    cosine = (unit * b / size_b).sum(1, keepdim=True).clamp(-1, 1)
    across = torch.nn.functional.normalize(b / size_b - cosine * unit, dim=1)
    angle = t * cosine.acos()
    points: Tensor = (angle.cos() * unit + angle.sin() * across) * torch.lerp(size_a, size_b, t)
    return points.reshape(shape)


def shrink_for_distance(images: Tensor, face: bool) -> Tensor:
    """What of an image counts: the middle of a face if asked for, then edges of 256 pixels at most, by averaging.

    The crop is that of the authors' evaluation of faces: 3/8 to 7/8 of the height, 1/4 to 3/4 of the width.
    """
    if face:
        height, width = images.shape[2] // 8, images.shape[3] // 8
        images = images[:, :, 3 * height : 7 * height, 2 * width : 6 * width]
    factor = min(images.shape[2:]) // _EDGE
    return torch.nn.functional.avg_pool2d(images, factor) if factor > 1 else images


def mean_length(lengths: NDArray[np.floating]) -> Estimate:
    """Mean without the shortest and the longest hundredth, and its standard error."""
    values = np.asarray(lengths, dtype=np.float64)
    low = np.percentile(values, _PERCENT[0], method="lower")
    high = np.percentile(values, _PERCENT[1], method="higher")
    kept = values[(values >= low) & (values <= high)]
    error = kept.std(ddof=1) / np.sqrt(len(kept)) if len(kept) > 1 else np.nan
    return Estimate(float(kept.mean()), float(error))


def _styles(system: System, latents: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    found = system.styles(latents, labels)
    assert found is not None, "check_walkable"
    return dict(found)


def _lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(a, b, t.reshape(-1, *[1] * (a.ndim - 1)))


@dataclass(frozen=True)
class _Walk:
    """A path length that was asked for."""

    metric: Metric
    extractor: Extractor

    @classmethod
    def of(cls, metric: Metric, device: torch.device | str) -> _Walk:
        return cls(metric, get_extractor(metric.extractor, device))

    @property
    def space(self) -> str:
        """`z` or `w`."""
        return self.metric.kind[4]

    @property
    def full(self) -> bool:
        """Whether t is random."""
        return "full" in self.metric.kind

    def lengths(self, first: Tensor, second: Tensor) -> NDArray[np.float64]:
        """[N] distances per squared step."""
        pairs = [shrink_for_distance(images, self.metric.kind.endswith("-face")) for images in (first, second)]
        if isinstance(self.extractor, Lpips):
            distance = self.extractor.distance(*pairs)
        else:
            a, b = (self.extractor.features(images) for images in pairs)
            distance = (a - b).double().square().sum(1)
        found: NDArray[np.float64] = distance.cpu().double().numpy() / EPSILON**2
        return found
