"""What to do when a GPU's memory is exhausted: the slice size to try, from what an image took so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bessemer.errors import MachineError
from bessemer.spec.job import JobSpec

__all__ = ["MemoryAdvice", "MemoryUse", "advice", "fitting_slice_size", "legal_slice_sizes"]

_SHARE = 0.9
"""Of the free memory that a slice may take: the allocator never packs perfectly."""


@dataclass(frozen=True)
class MemoryUse:
    """A device's memory at the moment when it did not suffice; in bytes."""

    capacity: int
    """What this process could have at most."""
    held: int
    """Weights, optimizer states, averages: what is there between two iterations."""
    wanted: int
    """What was allocated at most, with what could not be allocated any more."""
    completed: bool
    """Whether an iteration had fitted before, so that `wanted` is about all that a slice needs."""


def legal_slice_sizes(batch_size: int, workers: int) -> list[int]:
    """Slice sizes that divide the batch into as many slices for every worker, ascending."""
    return [n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n % workers == 0]


def fitting_slice_size(use: MemoryUse, batch_size: int, slice_size: int, workers: int) -> int | None:
    """The largest legal slice size that should fit; None if not even the smallest does.

    Memory is taken to grow with the images of a slice. A slice that never went through may have needed far more than it
    got, so then at most half of it is tried.
    """
    per_image = max(use.wanted - use.held, 1) / slice_size
    room = (use.capacity - use.held) * _SHARE
    most = min(room / per_image, slice_size - 1 if use.completed else slice_size // 2)
    fitting = [n for n in legal_slice_sizes(batch_size, workers) if n <= most]
    return fitting[-1] if fitting else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def advice(use: MemoryUse, job: JobSpec, workers: int, device: str) -> str:
    """The message for people."""
    training = job.training
    found = fitting_slice_size(use, training.batch_size, training.slice_size, workers)
    per_image = (use.wanted - use.held) / training.slice_size
    facts = (
        f"training.slice_size: {training.slice_size} images do not fit into the {_gib(use.capacity)} of {device}: "
        f"{_gib(use.held)} hold weights, optimizer states and averages, and an image takes "
        f"{'about' if use.completed else 'at least'} {_gib(per_image)}"
    )
    if found is not None:
        return (
            f"{facts}; start again with training.slice_size {found} (the batch stays {training.batch_size}; batch "
            "statistics and random numbers are those of smaller slices)."
        )
    ways = []
    if training.zero_stage < 2 and workers > 1:
        ways.append("set training.zero_stage to 2")
    if training.precision == "fp32":
        ways.append("set training.precision to bf16")
    if job.ema.profiles:
        ways.append("list fewer ema.profiles")
    ways.append("take a smaller preset or a larger device")
    return f"{facts}; no smaller slice size that divides the batch fits: {', or '.join(ways)}."


class MemoryAdvice:
    """Turns running out of memory in an iteration into an error that says what to do. Does nothing on the CPU."""

    def __init__(self, job: JobSpec, workers: int, device: torch.device) -> None:
        self._job, self._workers, self._device = job, workers, device
        self._completed = False

    @contextmanager
    def given(self) -> Iterator[None]:
        """Around an iteration.

        Raises:
            MachineError: the device's memory did not suffice.
        """
        if self._device.type != "cuda":
            yield
            return
        held = torch.cuda.memory_allocated(self._device)
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            free, _ = torch.cuda.mem_get_info(self._device)
            capacity = torch.cuda.memory_reserved(self._device) + free
            # The request that failed is in no statistic but the message; what is full was wanted at the least.
            wanted = max(torch.cuda.max_memory_allocated(self._device), capacity)
            use = MemoryUse(capacity, held, wanted, self._completed)
            raise MachineError(advice(use, self._job, self._workers, str(self._device))) from None
        self._completed = True
