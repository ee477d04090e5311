"""What is known of the devices that we train on: memory, and the arithmetic that they can do at most."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["DEVICES", "Device", "copy_speed", "find_device", "matmul_peak", "peak_flops"]


@dataclass(frozen=True)
class Device:
    """An accelerator, as its data sheet describes it."""

    name: str
    memory: int
    """Bytes that a process can allocate; the driver and the CUDA context take the rest of what the name says."""
    peaks: Mapping[str, float]
    """Precision of a job -> FLOP/s with dense matrices. `fp32` means TF32 where there is TF32, which is what PyTorch
    lets cuDNN use for fp32 convolutions. A precision that is missing has no hardware."""
    bandwidth: float
    """Bytes/s of its memory."""
    pattern: str
    """Regular expression for PyTorch's name of the device."""


_GIB = 1 << 30
_HOPPER = {"fp32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}

# Data sheets of NVIDIA, SXM versions, without sparsity; a multiply-add is two operations.
DEVICES: Mapping[str, Device] = {
    "h200": Device("NVIDIA H200", 139 * _GIB, _HOPPER, 4.8e12, r"\bH200$"),
    "h100": Device("NVIDIA H100 80GB", 78 * _GIB, _HOPPER, 3.35e12, r"\bH100 80GB HBM3\b"),
    "a100": Device(
        "NVIDIA A100 80GB", 78 * _GIB, {"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}, 2.04e12, r"\bA100-"
    ),
    "v100": Device("NVIDIA V100 32GB", 31 * _GIB, {"fp32": 15.7e12, "fp16": 125e12}, 0.9e12, r"\bV100-SXM"),
}
"""Key of ``bessemer plan --device`` -> device."""


def find_device(name: str) -> Device | None:
    """The device whose name PyTorch reports, such as ``NVIDIA H100 80GB HBM3``; None for one we know nothing of.

    Cards of the same generation for other slots (PCIe, NVL) are slower, and are not taken for these.
    """
    return next((device for device in DEVICES.values() if re.search(device.pattern, name)), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the device of this process reaches at most; None where we do not know.

    A CPU's peak is measured, with as many threads as torch uses here: a data sheet would tell of another number of
    cores, and of a clock that it does not run at.

    Args:
        device: of this process.
        precision: of the job.
    """
    if device.type == "cpu":
        return matmul_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.peaks.get(precision) if known is not None else None


def matmul_peak(dtype: torch.dtype, size: int = 768, repeats: int = 4) -> float:
    """FLOP/s of the fastest of a few products of two square matrices on the CPU; takes some 0.1 s."""
    a = torch.ones(size, size, dtype=dtype)
    b = torch.ones(size, size, dtype=dtype)
    out = torch.mm(a, b)  # the first sets the library up
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def copy_speed(size: int = 1 << 26, repeats: int = 4) -> float:
    """Bytes/s that the CPU reads and writes in the fastest of a few copies beyond its caches; takes some 0.1 s."""
    a = torch.ones(size, dtype=torch.uint8)
    out = a.clone()
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        out.copy_(a)
        best = min(best, time.perf_counter() - begun)
    return 2 * size / best
