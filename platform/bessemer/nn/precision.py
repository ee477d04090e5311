"""Keeping small, delicate computations out of automatic mixed precision, and out of TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision"]

_SWITCH: tuple[Any, str, Any] = (
    (torch.backends.cudnn.conv, "fp32_precision", "ieee")  # from PyTorch 2.9 on, which refuses a mix with the older one
    if hasattr(torch.backends.cudnn, "conv")
    else (torch.backends.cudnn, "allow_tf32", False)
)
"""Object, attribute and value that keep cuDNN's convolutions exact."""


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the tensor's device; devices that know no autocast (meta) need none.

    Convolutions keep all bits of float32, too: by default cuDNN rounds their factors to TF32, which has 10 bits after
    the point where float32 has 23. Matrix products are not rounded unless a person asks for it. What runs later is not
    meant: a backward pass outside, or a compiled graph, which has no place for a switch.
    """
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return _exact(device)


@contextmanager
def _exact(device: str) -> Iterator[None]:
    holder, name, exact = _SWITCH
    before = getattr(holder, name)
    setattr(holder, name, exact)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        setattr(holder, name, before)
