"""Failures of an evaluation: what to say when numbers are not finite, and what still counts then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bessemer.errors import EvaluationError
from bessemer.systems.contract import System

__all__ = ["not_finite", "noted"]

_NAMED = 8  # samples that a message names


def not_finite(system: System, what: str, bad: Sequence[int], total: int, remedy: str) -> EvaluationError:
    """The error to raise.

    Args:
        system: with the weights that were asked.
        what: such as `generated images`.
        bad: numbers of those that hold NaN or infinity, at least one.
        total: of how many.
        remedy: what helps where the weights are sound, and only single samples leave the range of floating point.
    """
    named = ", ".join(map(str, sorted(bad)[:_NAMED])) + (", ..." if len(bad) > _NAMED else "")
    found = f"{what}: {len(bad)} of {total} hold NaN or infinity (number {named})."
    networks = {name: system.networks()[name] for name in system.sampled_networks}
    lost = [name for name, n in networks.items() if not all(bool(p.isfinite().all()) for p in n.parameters())]
    if lost:
        return EvaluationError(
            f"{found} The weights of {' and '.join(lost)} are not finite: the run has diverged. Resume from an earlier "
            "checkpoint with a lower learning rate."
        )
    return EvaluationError(
        f"{found} All weights are finite, so values grow beyond floating point on the way. {remedy} If there are more "
        "each time, the run diverges: resume from an earlier checkpoint with a lower learning rate."
    )


@contextmanager
def noted(failures: list[str]) -> Iterator[None]:
    """Keep what a part of an evaluation says when it fails, on all workers alike: its other parts still count."""
    try:
        yield
    except EvaluationError as e:
        failures.append(str(e))
