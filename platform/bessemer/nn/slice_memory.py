"""Rows that outlive an update: persistent Markov chains, pools of generated images.

They belong to the slices of the global batch, an equal share to each, not to the workers: what a slice reads and writes
then does not depend on who computes it. All workers hold all rows, so a run resumes exactly on any number of them, and
any worker can write the checkpoint; for that the rows are summed over the workers as an update ends. CycleGAN's two
pools of 50 images of 256 pixels are 79 MB of such a sum, of the size of its generators' gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.nn.update_state import UpdateStateLayer

__all__ = ["SliceMemory"]


class SliceMemory(UpdateStateLayer):
    """A table of rows, zeros at first.

    Args:
        rows: of all slices together; a multiple of the number of slices.
        shape: of one row.
    """

    values: Tensor
    """[rows, *shape]"""
    sum_values: Tensor
    sum_written: Tensor

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(rows, *shape))
        self.register_buffer("sum_values", torch.zeros(rows, *shape), persistent=False)
        self.register_buffer("sum_written", torch.zeros(rows), persistent=False)

    def _rows(self, index: int, slices: int) -> slice:
        rows = len(self.values) // slices
        assert rows * slices == len(self.values), f"{len(self.values)} rows in {slices} slices"
        return slice(index * rows, (index + 1) * rows)

    def read(self, index: int, slices: int) -> Tensor:
        """Rows of slice `index` of `slices` as they were before this update, [rows/slices, *shape]."""
        return self.values[self._rows(index, slices)]

    @torch.no_grad()
    def write(self, index: int, slices: int, values: Tensor) -> None:
        """Replace the slice's rows as the update ends."""
        rows = self._rows(index, slices)
        self.sum_values[rows] = values.to(self.sum_values.dtype)
        self.sum_written[rows] = 1

    def begin_update(self) -> None:
        self.sum_values.zero_()
        self.sum_written.zero_()

    def pending(self) -> list[Tensor]:
        return [self.sum_values, self.sum_written]

    def end_update(self) -> None:
        written = self.sum_written.view(-1, *[1] * (self.values.ndim - 1)) > 0
        self.values.copy_(torch.where(written, self.sum_values, self.values))
