"""The kernel against the convolutions: on a GPU, or anywhere with TRITON_INTERPRET=1 and Triton installed."""

import importlib
import itertools
import os

import pytest
import torch
from torch import Tensor

from bessemer.nn.upfirdn import _reference, upfirdn

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1", allow_module_level=True)

upfirdn_triton = importlib.import_module("bessemer.nn.upfirdn_triton").upfirdn_triton
pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = list(itertools.product([1, 2], [1, 2], [(2, 1), (0, 3)], [4, 7], [False, True]))


def _derivatives(y: Tensor, x: Tensor) -> list[Tensor]:
    """The output, the gradient of a cubic in it, and the gradient of that gradient's square."""
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [y.detach(), first.detach(), second]


@pytest.mark.parametrize(("up", "down", "padding", "length", "channels_last"), CASES)
def test_kernel_and_its_derivatives_equal_the_reference_in_double_precision(
    up: int, down: int, padding: tuple[int, int], length: int, channels_last: bool
) -> None:
    taps = torch.linspace(-0.5, 1, length, device=DEVICE)
    x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    exact, quick = x.double().requires_grad_(), x.requires_grad_()
    expected = _derivatives(_reference(exact, taps.double(), up, down, padding), exact)
    actual = _derivatives(upfirdn_triton(quick, taps, up, down, padding), quick)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * e.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype: torch.dtype) -> None:
    taps = torch.linspace(-0.5, 1, 4, device=DEVICE)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    y = upfirdn_triton(x, taps.to(dtype), 2, 1, (2, 1))
    assert y.dtype == dtype
    expected = _reference(x.double(), taps.to(dtype).double(), 2, 1, (2, 1))
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(INTERPRETED, reason="is chosen on CUDA alone")
def test_it_is_chosen_on_cuda() -> None:
    x = torch.randn(1, 1, 4, 4, device="cuda", requires_grad=True)
    taps = torch.ones(3, device="cuda")
    assert "UpFirDn" in type(upfirdn(x, taps).grad_fn).__name__
    assert "UpFirDn" not in type(upfirdn(x.double(), taps.double()).grad_fn).__name__
