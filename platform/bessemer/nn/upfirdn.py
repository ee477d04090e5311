"""Resampling by filters: upsample, finite impulse response, downsample (as in StyleGAN, Karras et al. 2019).

Everything here is made of convolutions, which PyTorch differentiates any number of times. On CUDA, where Triton is
installed with PyTorch, one kernel does the same (:mod:`bessemer.nn.upfirdn_triton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.nn.precision import full_precision

__all__ = ["BINOMIAL", "SYM6", "blur", "downsample", "filter_taps", "upfirdn", "upsample"]

BINOMIAL = (0.125, 0.375, 0.375, 0.125)
"""[1, 3, 3, 1]/8: the low-pass filter of StyleGAN2's networks; its sum is 1."""
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""Low-pass filter of the 6-tap symlet (Daubechies 1992): orthogonal to itself shifted by any even number."""

_DENSE = 6
"""Filters up to this length are applied in both directions at once, longer ones in one after the other."""
_TRITON = find_spec("triton") is not None


def filter_taps(taps: Sequence[float], like: Tensor, gain: float = 1.0) -> Tensor:
    """The filter as a tensor [k] of `like`'s kind, its coefficients scaled by `gain`."""
    return torch.tensor([gain * t for t in taps], dtype=like.dtype, device=like.device)


def upfirdn(x: Tensor, taps: Tensor, *, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Put `up - 1` zeros after each pixel, pad with zeros, convolve with the filter, keep each `down`-th pixel.

    Args:
        x: [N, C, H, W].
        taps: [k], the filter of both directions.
        up: factor of the upsampling.
        down: factor of the downsampling.
        padding: zeros before and after, in both directions; negative numbers crop. Before: at most k - 1 where up > 1.

    Returns:
        [N, C, H', W'] of the dtype of `x`, H' = (up·H + before + after - k)//down + 1.
    """
    if _TRITON and x.is_cuda and x.dtype is not torch.float64:  # the kernel sums in float32
        from bessemer.nn.upfirdn_triton import upfirdn_triton

        return upfirdn_triton(x, taps, up, down, padding)
    return _reference(x, taps, up, down, padding)


def _reference(x: Tensor, taps: Tensor, up: int, down: int, padding: tuple[int, int]) -> Tensor:
    """:func:`upfirdn` by convolutions."""
    k = len(taps)
    flipped = taps.flip(0)  # conv2d correlates
    kernels = [(flipped[:, None] * flipped)] if k <= _DENSE else [flipped[:, None], flipped[None]]
    with full_precision(x):  # in the type of x, whatever autocast would choose
        for kernel in kernels:
            x = _along(x, kernel, up, down, padding)
    return x


def _along(x: Tensor, kernel: Tensor, up: int, down: int, padding: tuple[int, int]) -> Tensor:
    """:func:`upfirdn` with a kernel [kh, kw], in the directions in which it is longer than one."""
    before, after = padding
    c, sizes = x.shape[1], kernel.shape
    both = [k > 1 for k in sizes]
    weight = kernel.expand(c, 1, *sizes)
    ups, downs = ([factor if b else 1 for b in both] for factor in (up, down))
    if up == 1:
        if before == after >= 0:
            pads = [before if b else 0 for b in both]
            return F.conv2d(x, weight, stride=downs, padding=pads, groups=c)
        return F.conv2d(F.pad(x, _pad_list(both, before, after)), weight, stride=downs, groups=c)
    # A transposed convolution computes all that the zeros between the pixels leave; the rest is cropping.
    k = max(sizes)
    assert before < k
    full = F.conv_transpose2d(x, weight.flip(2, 3), stride=ups, groups=c)
    out = F.pad(full, _pad_list(both, before - k + 1, after + up - k))
    return out if down == 1 else out[:, :, :: downs[0], :: downs[1]]


def _pad_list(both: list[bool], before: int, after: int) -> list[int]:
    """Arguments of F.pad, which begins with the last dimension."""
    return [n if b else 0 for b in reversed(both) for n in (before, after)]


def blur(x: Tensor, padding: tuple[int, int], gain: float = 1.0) -> Tensor:
    """Filter with :data:`BINOMIAL`; [N, C, H, W] -> [N, C, H', W'] with H' = H + before + after - 3."""
    return upfirdn(x, filter_taps(BINOMIAL, x, gain**0.5), padding=padding)


def upsample(x: Tensor) -> Tensor:
    """Double the size with :data:`BINOMIAL`, keeping the mean: [N, C, H, W] -> [N, C, 2H, 2W]."""
    return upfirdn(x, filter_taps(BINOMIAL, x, 2), up=2, padding=(2, 1))


def downsample(x: Tensor) -> Tensor:
    """Halve the size with :data:`BINOMIAL`: [N, C, H, W] with even H and W -> [N, C, H/2, W/2]."""
    return upfirdn(x, filter_taps(BINOMIAL, x), down=2, padding=(1, 1))
