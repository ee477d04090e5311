"""Tensors without values, in which memory is planned."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["has_values"]


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
