"""Why workers ended: what they leave in the run directory, and what the driver makes of it."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Failure", "clear_failures", "leave_failure", "read_failure"]

_BROKEN_CONNECTIONS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_BROKEN_WORDS = re.compile(
    r"gloo[/.]|\bNCCL\b|connection (?:closed|reset|refused)|broken pipe|socket timeout", re.IGNORECASE
)


@dataclass(frozen=True)
class Failure:
    """How an attempt to train ended."""

    reasons: Mapping[str, str]
    """Worker -> one line."""
    worker: int | None = None
    """The worker whose own code raised; None where workers were lost, or only noticed that others were."""
    place: tuple[str, ...] = ()
    """Where: type of the error, then file and line of every frame."""
    traceback: str = ""

    def is_same_as(self, other: Failure | None) -> bool:
        """Whether the same line of code failed in the same way."""
        return other is not None and self.worker is not None and self.place == other.place

    @property
    def line(self) -> str:
        """The whole failure in one line."""
        if self.worker is not None:
            return f"worker {self.worker}: {self.reasons[str(self.worker)]}"
        return "; ".join(f"worker {rank}: {reason}" for rank, reason in self.reasons.items()) or "no reason was given"


def leave_failure(directory: Path, rank: int, error: Exception) -> None:
    """Leave in `directory` how worker `rank` failed, for the driver: Ray passes an error on without its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    left = {
        "type": type(error).__name__,
        "message": first_line(error),
        "place": [f"{frame.filename}:{frame.lineno}" for frame in frames],
        "traceback": "".join(traceback.format_exception(error)),
        "noticed": _noticed_others(error),
    }
    with contextlib.suppress(OSError):  # it may be the disk that failed
        directory.mkdir(exist_ok=True)
        (directory / f"worker-{rank}.json").write_text(json.dumps(left))


def clear_failures(directory: Path) -> None:
    """Forget what an earlier attempt left."""
    for file in directory.glob("worker-*.json"):
        file.unlink(missing_ok=True)


def read_failure(directory: Path, lost: Mapping[int, BaseException], why: str = "") -> Failure:
    """What ended an attempt, from what its workers left in `directory`.

    Args:
        directory: where they did.
        lost: rank -> what Ray says.
        why: where no worker is to blame.
    """
    reasons = {str(rank): first_line(each) for rank, each in sorted(lost.items())} or {"?": why}
    own: list[tuple[int, dict[str, Any]]] = []
    for file in sorted(directory.glob("worker-*.json")):
        with contextlib.suppress(OSError, ValueError):
            left = json.loads(file.read_text())
            rank = int(file.stem.rpartition("-")[2])
            reasons[str(rank)] = f"{left['type']}: {left['message']}"
            if not left["noticed"]:
                own.append((rank, left))
    if not own:
        return Failure(reasons)
    rank, left = own[0]
    return Failure(reasons, rank, (left["type"], *left["place"]), left["traceback"])


def first_line(error: BaseException) -> str:
    """An error in one line that is not too long."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:300] if lines else type(error).__name__


def _noticed_others(error: Exception) -> bool:
    """Whether this is what a worker sees when another one is gone: a collective call that fails."""
    if type(error).__name__ in _BROKEN_CONNECTIONS:
        return True
    return isinstance(error, (RuntimeError, OSError)) and _BROKEN_WORDS.search(str(error)) is not None
