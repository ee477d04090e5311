"""Keeping small, delicate computations out of automatic mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["full_precision"]


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the tensor's device; devices that know no autocast (meta) need none."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
