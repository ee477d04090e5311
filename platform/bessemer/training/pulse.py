"""What the workers tell each other once per iteration."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from bessemer.training.distributed import COLLECTIVE_TIMEOUT, Workers

__all__ = ["Pulse"]


class Pulse:
    """Sums a few flags over the workers in the background, so that all workers act on the same knowledge.

    The sums of one beat are read at the next. So nobody waits, and a GPU is never synchronised for it: the sums run
    over gloo, in a group of their own, whatever the gradients run over.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._group: Any = None
        self._beat: tuple[Any, torch.Tensor] | None = None

    def beat(self, *flags: bool) -> list[int]:
        """Send this worker's flags; how many workers had each of them set at the last beat. Collective.

        A single worker reads its own flags at once.
        """
        if self._workers.size == 1:
            return [int(flag) for flag in flags]
        sums = self.drain() or [0] * len(flags)
        counts = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._beat = dist.all_reduce(counts, group=self._group, async_op=True), counts
        return sums

    def drain(self) -> list[int] | None:
        """Forget the last beat, once it has arrived; its sums, or None before the first. Collective."""
        if self._beat is None:
            return None
        work, counts = self._beat
        self._beat = None
        work.wait()
        sums: list[int] = counts.tolist()
        return sums
