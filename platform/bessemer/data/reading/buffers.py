"""Memory for batches, used again and again: fresh memory costs a page fault for every 4 KiB that is written to it."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Buffers"]


class Buffers:
    """Buffers of one shape. A buffer is handed out again once nothing refers to the tensor that it was.

    Args:
        shape: of every buffer.
        pinned: page-locked memory, from which a GPU copies while the CPU goes on. torch keeps and reuses it itself,
            after the copies that read it have ended.
    """

    def __init__(self, shape: tuple[int, ...], *, pinned: bool = False):
        self._shape = shape
        self._pinned = pinned
        # A deque and no lock: a buffer can come back in the middle of anything, whenever Python drops a tensor.
        self._free: deque[NDArray[np.uint8]] = deque()

    def take(self) -> Tensor:
        """A uint8 tensor with any content."""
        if self._pinned:
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, dtype=np.uint8)
        view = memory.view()
        # torch holds the view as long as any tensor of this memory lives, however it was sliced or reshaped.
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)
