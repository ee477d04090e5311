"""A sum over the workers that can be differentiated any number of times."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_rows", "sum_over_workers"]


class _Sum(torch.autograd.Function):
    """Sum over the workers. Each worker's output depends alike on every input, so the gradient is again a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # autograd hands it in
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return sum_over_workers(gradient)


def sum_over_workers(x: Tensor) -> Tensor:
    """Sum of all workers' `x`, on each of them. Collective, and so are its derivatives."""
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total


def gather_rows(row: Tensor, rank: int, size: int) -> Tensor:
    """[features] of each worker -> [workers, features] on every worker. Collective, and so are its derivatives."""
    place = torch.zeros(size, 1, dtype=row.dtype, device=row.device)
    place[rank] = 1
    return sum_over_workers(place * row)
