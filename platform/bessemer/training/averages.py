"""Means of what training says of itself, between two lines of the journal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bessemer.systems.contract import Loss
from bessemer.training.distributed import Workers

__all__ = ["Averages"]


@dataclass
class Averages:
    """Means of scalars over slices and steps, kept on the device: nothing waits for them until they are logged."""

    workers: Workers
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Count one value of a scalar."""
        value = value.detach().float().reshape(())
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def add_losses(self, update: str, losses: list[Loss]) -> None:
        """Count the losses of an update's slices, and what they say besides."""
        for loss in losses:
            self.add(f"loss/{update}", loss.value)
            for name, value in loss.scalars.items():
                self.add(name, value)

    def take(self) -> dict[str, float]:
        """Means over all workers since the last call. Collective."""
        names = sorted(self.sums)
        if not names:
            return {}
        stacked = torch.stack([self.sums[n] / self.counts[n] for n in names]).double()
        means = (self.workers.sum(stacked) / self.workers.size).tolist()
        self.sums.clear()
        self.counts.clear()
        return dict(zip(names, means, strict=True))
