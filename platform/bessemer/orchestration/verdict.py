"""What evaluations mean for a run: go on, stop early, or go back to its best checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from bessemer.spec.job import EvaluationSpec
from bessemer.tracking.runs import Point, evaluation_curves, load_run

__all__ = ["Verdict", "judge_curve", "verdict_on"]


class Verdict(NamedTuple):
    """What is to be done, and why."""

    action: Literal["stop", "rollback"]
    reason: str
    """The beginning of a sentence."""
    latest: int | None = None
    """Newest moment, in images, to go back to."""


def verdict_on(run: Path, spec: EvaluationSpec) -> Verdict | None:
    """Look at the first metric of a run's job, by the run's own protocol, as its journal stands."""
    if not spec.metrics or (spec.stop_after_kimg is None and spec.rollback_at is None):
        return None
    curve = next((c for c in evaluation_curves(load_run(run)) if c.metric == spec.metrics[0]), None)
    return None if curve is None else judge_curve(curve.points, spec, curve.higher_is_better)


def judge_curve(points: Sequence[Point], spec: EvaluationSpec, higher_is_better: bool = False) -> Verdict | None:
    """Judge values of the first metric, in order of images seen.

    A value is an improvement when it is better than the best one by more than its own standard error.
    """
    if not points:
        return None
    sign = -1.0 if higher_is_better else 1.0
    leader = points[0]
    for point in points:
        if sign * point.value < sign * leader.value - (point.standard_error or 0.0):
            leader = point
    metric, last = spec.metrics[0], points[-1]
    if spec.rollback_at is not None:
        # Kernel distances scatter around zero: less than its own error is no scale to measure by.
        best = min(points, key=lambda p: sign * p.value)
        scale = max(best.value, best.standard_error or 0.0)
        if higher_is_better:
            is_lost, how = last.value * spec.rollback_at < best.value, f"less than 1/{spec.rollback_at:g}"
        else:
            is_lost, how = last.value > spec.rollback_at * scale, f"more than {spec.rollback_at:g} times"
        if is_lost and last.nimg > best.nimg:
            return Verdict(
                "rollback",
                f"{metric} is {last.value:.4g} at {last.nimg / 1000:g} kimg, {how} its "
                f"best, {best.value:.4g} at {best.nimg / 1000:g} kimg (evaluation.rollback_at)",
                latest=best.nimg,
            )
    if spec.stop_after_kimg is not None and last.nimg - leader.nimg >= spec.stop_after_kimg * 1000:
        return Verdict(
            "stop",
            f"{metric} has not improved on {leader.value:.4g} since {leader.nimg / 1000:g} kimg "
            "(evaluation.stop_after_kimg)",
        )
    return None
