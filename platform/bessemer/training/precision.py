"""Arithmetic of the forward pass. Weights, gradients and optimizer states stay in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["mixed_precision"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast to the job's ``training.precision``; nothing changes for ``fp32``."""
    return torch.autocast(device.type, _TYPES.get(precision, torch.bfloat16), enabled=precision in _TYPES)
