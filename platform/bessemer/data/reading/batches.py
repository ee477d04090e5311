"""Batches as the decoder leaves them: bytes until they are on the device that trains, numbers from there on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bessemer.data.fields import FieldRecord
from bessemer.systems.contract import Batch

__all__ = ["RawBatch", "as_numbers"]


def as_numbers(name: str, values: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """What a data set stores as the numbers that systems see: float32.

    Args:
        name: of the field.
        values: uint8 pixels, which come out in [-1, 1]; int16 sound, in [-1, 1); uint8 bits, as they are.
        memory_format: of what comes out.
    """
    numbers = values.to(torch.float32, memory_format=memory_format)
    if name == "bits":
        return numbers
    if name == "audio":
        return numbers.div_(32768.0)
    # By a tensor: CUDA would multiply by a number's reciprocal, and white would not be 1.
    scale = torch.full((), 127.5, device=numbers.device)
    return numbers.div_(scale).sub_(1.0)


class RawBatch(Batch):
    """A slice in which fields become numbers when they are asked for.

    Args:
        raw: field -> [N, *stored_shape], as the decoder lays it out; see :class:`bessemer.data.fields.FieldRecord`.
        labels: [N] int64.
        records: what the fields are.
        mirrored: field -> [N] bool, pictures to flip left-right; those of other fields stay as they are.
    """

    def __init__(
        self,
        raw: Mapping[str, Tensor],
        labels: Tensor,
        records: Mapping[str, FieldRecord],
        mirrored: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(None, labels)
        self.raw = raw
        self.mirrored = mirrored or {}
        self._records = records

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.raw)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.raw and name not in self._fields:
            self._fields[name] = self._numbers(name, self.raw[name].device, torch.contiguous_format)
        return super().__getitem__(name)

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        """The batch on `device`: bytes travel there, and become numbers there."""
        if all(device == raw.device for raw in self.raw.values()):
            return Batch(None, self.labels, **{name: self[name] for name in self.names}).to(device, memory_format)
        fields = {name: self._numbers(name, device, memory_format) for name in self.names}
        return Batch(None, self.labels.to(device, non_blocking=True), **fields)

    def _numbers(self, name: str, device: torch.device, memory_format: torch.memory_format) -> Tensor:
        raw = self.raw[name].to(device, non_blocking=True)
        record = self._records[name]
        if name == "bits":
            # The first bit of a byte is its highest, as numpy.packbits has it.
            shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
            return as_numbers(name, (raw[..., None] >> shifts & 1).flatten(1)[:, : record.shape[0]])
        if name == "audio":
            return as_numbers(name, raw)
        if (mirrored := self.mirrored.get(name)) is not None:
            flips = mirrored.to(device, non_blocking=True).reshape(-1, *[1] * (raw.ndim - 1))
            raw = torch.where(flips, raw.flip(-2), raw)
        pictures = raw.movedim(-1, -3)
        layout = memory_format if pictures.ndim == 4 else torch.contiguous_format
        return as_numbers(name, pictures, layout)
