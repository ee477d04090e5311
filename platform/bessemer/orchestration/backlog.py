"""Which snapshots wait for the evaluator. The journal says it, so it survives everybody who reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bessemer.tracking.journal import Record, read_entries

__all__ = ["Backlog", "Published", "split"]


class Published(NamedTuple):
    """A snapshot that was published for evaluation. Sorts by time."""

    nimg: int
    path: str
    """Below the run directory."""
    weights_sha256: str


class Backlog:
    """Follows a journal; each :meth:`read` takes in what came since the last one.

    Attributes:
        over: whether training has ended, so that nothing more will come.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._offset = journal, 0
        self._waiting: dict[int, Published] = {}
        self.over = False

    def read(self) -> list[Published]:
        """Snapshots that were published and neither judged nor left out, oldest first."""
        for record, end in read_entries(self._journal, self._offset):
            self._offset = end
            if record["kind"] == "event":
                self._take(record)
        return sorted(self._waiting.values())

    def _take(self, record: Record) -> None:
        nimg = record["nimg"]
        match record.get("event"):
            case "snapshot":
                self._waiting[nimg] = Published(nimg, str(record.get("path")), str(record.get("weights_sha256")))
            case "evaluated" | "evaluation_skipped" | "evaluation_failed":
                waiting = self._waiting.get(nimg)
                if waiting is not None and waiting.weights_sha256 == record.get("weights_sha256"):
                    del self._waiting[nimg]
            case "resumed":  # what lies beyond is not part of the run any more
                self._waiting = {n: published for n, published in self._waiting.items() if n <= nimg}
                self.over = False
            case "started":
                self.over = False
            case "finished" | "preempted" | "stopped" | "failed":
                self.over = True


def split(waiting: Sequence[Published], most: int) -> tuple[list[Published], list[Published]]:
    """What to judge, in this order, and what to leave out because too much waits.

    The newest snapshot comes first: it is what people look for. Of more than `most`, the older ones are left out, but
    never that of the untrained networks, from which every curve begins.

    Args:
        waiting: oldest first.
        most: snapshots that may wait.
    """
    newest = list(reversed(waiting))
    beyond = [published for published in newest[most:] if published.nimg > 0]
    return [published for published in newest if published not in beyond], beyond
