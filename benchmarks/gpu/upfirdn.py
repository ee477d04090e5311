"""The Triton kernel of up- and downsampling beside convolutions: values and three passes, and their time.

Values are compared with float64: the output, its gradient and the gradient of that. Goal: less than the convolutions'
time in every pass. Shapes are those of StyleGAN2 at 256 pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _gpu import Timer, gpu_options
from torch import Tensor

from _common import Ratio, alternate, finish, ratio  # isort: skip  # _gpu says where it is
from bessemer.nn.upfirdn import BINOMIAL, SYM6, _reference, filter_taps

Kernel = Callable[[Tensor, Tensor, int, int, tuple[int, int]], Tensor]
GOAL = 1.0

CASES: dict[str, tuple[tuple[int, ...], tuple[float, ...], int, int, tuple[int, int]]] = {
    "image_up": ((8, 3, 512, 512), BINOMIAL, 2, 1, (2, 1)),
    "blur": ((8, 128, 257, 257), BINOMIAL, 1, 1, (1, 1)),
    "before_stride": ((8, 128, 256, 256), BINOMIAL, 1, 1, (2, 2)),
    "skip_down": ((8, 128, 256, 256), BINOMIAL, 1, 2, (1, 1)),
    "augment_up": ((16, 3, 280, 280), SYM6, 2, 1, (6, 5)),
    "augment_down": ((16, 3, 522, 522), SYM6, 1, 2, (0, 0)),
}
"""Name -> shape, filter, up, down, padding."""


def passes(kernel: Kernel, x: Tensor, taps: Tensor, up: int, down: int, padding: tuple[int, int]) -> list[Tensor]:
    """The output, the gradient of a cubic in it, and the gradient of that gradient's square."""
    x = x.detach().requires_grad_()
    y = kernel(x, taps, up, down, padding)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [y.detach(), first.detach(), second]


def differences(kernel: Kernel, x: Tensor, taps: Tensor, *rest: Any) -> list[float]:
    """Largest difference of each of :func:`passes` from float64, over the largest value."""
    exact = passes(_reference, x.double(), taps.double(), *rest)
    pairs = zip(passes(kernel, x, taps, *rest), exact, strict=True)
    return [float((found - true).abs().max() / true.abs().max()) for found, true in pairs]


def measure(
    kernels: dict[str, Kernel], case: str, device: torch.device, rounds: int, dtype: torch.dtype, shrink: int = 1
) -> dict[str, Any]:
    """Differences from float64, and seconds of each pass of each kernel."""
    (n, c, h, w), filter_, up, down, padding = CASES[case]
    shape = (n, max(1, c // shrink), h // shrink, w // shrink)
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last if c > 3 else torch.contiguous_format)
    taps, rest = filter_taps(filter_, x, float(up)), (up, down, padding)
    timer = Timer(device)

    def forward(kernel: Kernel) -> float:
        with torch.no_grad():
            return timer.seconds(lambda: kernel(x, taps, *rest))

    def backward(kernel: Kernel) -> float:
        leaf = x.detach().requires_grad_()
        y = kernel(leaf, taps, *rest)
        return timer.seconds(lambda: torch.autograd.grad(y, leaf, torch.ones_like(y)))

    def double_backward(kernel: Kernel) -> float:
        leaf, weights = x.detach().requires_grad_(), torch.ones(1, device=device, dtype=dtype, requires_grad=True)
        y = kernel(leaf * weights, taps, *rest)
        (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return timer.seconds(lambda: torch.autograd.grad(first.sum(), leaf))

    sides = {"forward": forward, "backward": backward, "double_backward": double_backward}
    seconds = {
        name: alternate({k: (lambda k=k, f=f: f(kernels[k])) for k in kernels}, rounds, warm_up=3)  # type: ignore[misc]
        for name, f in sides.items()
    }
    differ = {k: differences(kernel, x, taps, *rest) for k, kernel in kernels.items()} if dtype is torch.float32 else {}
    return {"seconds": seconds, "differences": differ}


def main() -> int:
    """Measure every case."""
    options = gpu_options(__doc__)
    kernels: dict[str, Kernel] = {"plain": _reference}
    if options.device.type == "cuda":
        from bessemer.nn.upfirdn_triton import upfirdn_triton

        kernels["ours"] = upfirdn_triton
    else:  # to see that the benchmark runs
        kernels["ours"] = _reference
    # What is compared must be fp32 and not TF32, which cuDNN may take for convolutions.
    torch.backends.cudnn.allow_tf32 = False
    rounds, shrink = (3 if options.quick else 50), (1 if options.device.type == "cuda" else 8)
    ratios, raw = list[Ratio](), dict[str, Any]()
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{case}_{str(dtype).removeprefix('torch.')}"
            raw[name] = measure(kernels, case, options.device, rounds, dtype, shrink)
            for part, seconds in raw[name]["seconds"].items():
                ratios.append(ratio(f"{name}_{part}", seconds["ours"], seconds["plain"], GOAL))
            if raw[name]["differences"]:
                ratios.append(Ratio(f"{name}_difference", max(raw[name]["differences"]["ours"]), 1e-4))
    return finish(ratios, raw, options)


if __name__ == "__main__":
    sys.exit(main())
