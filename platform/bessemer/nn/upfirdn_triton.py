"""The resampling filter of :mod:`bessemer.nn.upfirdn` as one kernel for CUDA, written in Triton.

It is compiled when it is first used. The gradient of such a filter is such a filter again, up and down exchanged and
the taps reversed, so it can be differentiated any number of times. It stores nothing: the filter takes no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["upfirdn_triton"]

_BLOCK = 512


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _kernel(  # type: ignore[no-untyped-def]
    x, taps, y, numel, C, H, W, OH, OW, before, sn, sc, sh, sw, tn, tc, th, tw,
    UP: tl.constexpr, DOWN: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One output pixel per lane; x is read at strides s, y written at strides t, channels innermost if LAST."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < numel
    if LAST:
        c, ox, oy, n = i % C, (i // C) % OW, (i // C // OW) % OH, i // C // OW // OH
    else:
        ox, oy, c, n = i % OW, (i // OW) % OH, (i // OW // OH) % C, i // OW // OH // C
    place = x + n * sn + c * sc
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for a in range(K):
        v = oy * DOWN + (K - 1 - a) - before  # row of the image with zeros between its rows
        iy = v // UP
        row = there & (v >= 0) & (v % UP == 0) & (iy < H)
        line = tl.zeros((BLOCK,), dtype=tl.float32)
        for b in range(K):
            u = ox * DOWN + (K - 1 - b) - before
            ix = u // UP
            inside = row & (u >= 0) & (u % UP == 0) & (ix < W)
            line += tl.load(taps + b) * tl.load(place + iy * sh + ix * sw, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(taps + a) * line
    tl.store(y + n * tn + c * tc + oy * th + ox * tw, total.to(y.dtype.element_ty), mask=there)


class _UpFirDn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, up: int, down: int, before: int, after: int) -> Tensor:
        k, (n, c, h, w) = len(taps), x.shape
        oh, ow = ((up * size + before + after - k) // down + 1 for size in (h, w))
        last = c > 1 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        y = torch.empty((n, c, oh, ow), dtype=x.dtype, device=x.device, memory_format=layout)
        if y.numel():
            _kernel[(triton.cdiv(y.numel(), _BLOCK),)](
                x, taps.float(), y, y.numel(), c, h, w, oh, ow, before, *x.stride(), *y.stride(),
                UP=up, DOWN=down, K=k, LAST=last, BLOCK=_BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(taps)
        # Each size follows from that of the input, which the gradient must have again.
        ctx.back = (down, up, k - 1 - before)
        ctx.sizes = (h, w, oh, ow)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        up, down, before = ctx.back
        h, w, oh, ow = ctx.sizes
        # Square images need one number after; what a rectangle needs differs by less than `down`, and is cut off.
        after = max((to - 1) * down + len(taps) - up * size - before for to, size in ((h, oh), (w, ow)))
        back = _UpFirDn.apply(gradient, taps.flip(0), up, down, before, after)  # type: ignore[no-untyped-call]
        return back[:, :, :h, :w], None, None, None, None, None


def upfirdn_triton(x: Tensor, taps: Tensor, up: int, down: int, padding: tuple[int, int]) -> Tensor:
    """:func:`bessemer.nn.upfirdn.upfirdn`, of float32, float16 or bfloat16 on CUDA; sums are in float32."""
    out: Tensor = _UpFirDn.apply(x, taps, up, down, *padding)  # type: ignore[no-untyped-call]
    return out
