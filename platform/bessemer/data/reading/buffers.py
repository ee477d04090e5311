"""Memory for batches, used again and again: fresh memory costs a page fault for every 4 KiB that is written to it."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Buffers"]


class Buffers:
    """Buffers of one shape. A buffer is handed out again once nothing refers to the tensor that it was.

    Args:
        shape: of every buffer.
        dtype: of its values.
        pinned: page-locked memory, from which a GPU copies while the CPU goes on. torch keeps and reuses it itself,
            after the copies that read it have ended.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None, *, pinned: bool = False):
        self._shape = shape
        self._dtype = np.dtype(np.uint8) if dtype is None else dtype
        self._pinned = pinned
        # A deque and no lock: a buffer can come back in the middle of anything, whenever Python drops a tensor.
        self._free: deque[NDArray[Any]] = deque()

    def take(self) -> Tensor:
        """A tensor with any content."""
        if self._pinned:
            dtype = torch.from_numpy(np.empty(0, dtype=self._dtype)).dtype
            return torch.empty(self._shape, dtype=dtype, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, dtype=self._dtype)
        view = memory.view()
        # torch holds the view as long as any tensor of this memory lives, however it was sliced or reshaped.
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)
