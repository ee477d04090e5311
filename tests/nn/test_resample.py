import pytest
import torch
import torch.nn.functional as F

from bessemer.nn.resample import conv3x3_downsample, upsample, upsample_conv3x3


def _inputs(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, *size, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    return x, weight, bias


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (8, 8)])
def test_fused_steps_equal_the_two_steps_borders_and_gradients_included(size: tuple[int, int]) -> None:
    x, weight, bias = _inputs(size)
    pairs = [
        (upsample_conv3x3(x, weight, bias), F.conv2d(upsample(x), weight, bias, padding=1)),
        (conv3x3_downsample(x, weight, bias), F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)),
    ]
    for fused, plain in pairs:
        torch.testing.assert_close(fused, plain)
        grad = torch.randn_like(plain)
        ours = torch.autograd.grad(fused, (x, weight, bias), grad, retain_graph=True)
        theirs = torch.autograd.grad(plain, (x, weight, bias), grad, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [upsample_conv3x3, conv3x3_downsample])
def test_second_derivatives(function: object) -> None:
    x, weight, bias = _inputs((2, 2))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
