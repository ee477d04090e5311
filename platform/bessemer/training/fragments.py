"""Fragments: which part of which tensor a worker holds.

ZeRO cuts the flattened weights of a network into one piece per worker; a piece may begin and end inside a
parameter. A fragment names its parameter and its first element there, which is all that averaging, saving and
re-sharding need. Fragments of all workers cover each parameter exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.training.distributed import Workers

__all__ = ["Fragment", "gather_full"]


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one tensor."""

    name: str
    shape: torch.Size
    """Shape of the whole tensor."""
    start: int
    """First element, in the flattened tensor."""
    data: Tensor
    """1-D view of the elements."""

    @staticmethod
    def share(name: str, tensor: Tensor, rank: int, world: int) -> Fragment:
        """The rank-th of `world` nearly equal runs of a replicated, contiguous tensor (possibly empty)."""
        flat = tensor.view(-1)
        length = -(-flat.numel() // world)
        start = min(rank * length, flat.numel())
        return Fragment(name, tensor.shape, start, flat[start : start + length])

    def with_data(self, data: Tensor) -> Fragment:
        """The same place with other values."""
        return Fragment(self.name, self.shape, self.start, data)


def gather_full(fragments: Iterable[Fragment], shapes: dict[str, torch.Size], workers: Workers) -> dict[str, Tensor]:
    """Whole tensors on every worker from the fragments of all workers, in one collective call.

    Args:
        fragments: this worker's fragments.
        shapes: every tensor of the network, in the same order on all workers.
        workers: the group.

    Returns:
        name -> tensor on the workers' device; exact, since every element has one owner and the rest is zero.
    """
    flat = torch.zeros(sum(math.prod(s) for s in shapes.values()), device=workers.device)
    views = dict(zip(shapes, torch.split(flat, [math.prod(s) for s in shapes.values()]), strict=True))
    for fragment in fragments:
        views[fragment.name][fragment.start : fragment.start + fragment.data.numel()].copy_(fragment.data)
    workers.sum(flat)
    return {name: view.view(shapes[name]) for name, view in views.items()}
