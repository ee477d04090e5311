import itertools

import pytest
import torch
from torch import Tensor

from bessemer.nn.upfirdn import BINOMIAL, SYM6, downsample, filter_taps, upfirdn, upsample


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _by_loops(x: Tensor, taps: list[float], up: int, down: int, padding: tuple[int, int]) -> Tensor:
    """The definition, one number at a time, in one direction after the other."""

    def line(values: list[float]) -> list[float]:
        spread = [v for value in values for v in (value, *([0.0] * (up - 1)))]
        before, after = padding
        padded = [0.0] * max(before, 0) + spread + [0.0] * max(after, 0)
        padded = padded[max(-before, 0) : len(padded) - max(-after, 0)]
        k = len(taps)
        full = [sum(taps[j] * padded[i + k - 1 - j] for j in range(k)) for i in range(len(padded) - k + 1)]
        return full[::down]

    rows = [[[line(r.tolist()) for r in image] for image in images] for images in x]
    wide = torch.tensor(rows, dtype=x.dtype).transpose(2, 3)
    columns = [[[line(r.tolist()) for r in image] for image in images] for images in wide]
    return torch.tensor(columns, dtype=x.dtype).transpose(2, 3)


CASES = [
    *itertools.product([1, 2, 3], [1, 2], [(2, 1), (1, 1), (0, 3)]),
    (1, 1, (-1, 2)),
    (2, 1, (-1, -2)),
]


@pytest.mark.parametrize(("up", "down", "padding"), CASES)
@pytest.mark.parametrize("length", [4, 7])
def test_equals_the_definition(up: int, down: int, padding: tuple[int, int], length: int) -> None:
    taps = torch.linspace(-1, 2, length, dtype=torch.float64)  # no symmetry to hide behind
    x = _images(2, 3, 7, 6)
    expected = _by_loops(x, taps.tolist(), up, down, padding)
    torch.testing.assert_close(upfirdn(x, taps, up=up, down=down, padding=padding), expected)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("length", [4, 7])
def test_first_and_second_derivatives(up: int, down: int, length: int) -> None:
    taps = torch.linspace(-1, 2, length, dtype=torch.float64)
    x = _images(1, 2, 4, 3).requires_grad_()

    def squared(x: Tensor) -> Tensor:  # a linear function alone has no second derivative
        return upfirdn(x, taps, up=up, down=down, padding=(3, 2)).square()

    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x)


def test_resampling_keeps_constants_inside_and_sizes() -> None:
    x = torch.ones(1, 2, 8, 10)
    for y, size in ((upsample(x), (16, 20)), (downsample(x), (4, 5))):
        assert y.shape[2:] == size
        torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]))


def test_down_is_the_transpose_of_up() -> None:
    x, y = _images(1, 1, 6, 6), _images(1, 1, 12, 12)
    torch.testing.assert_close((upsample(x) * y).sum(), 4 * (x * downsample(y)).sum())


def test_the_filters_are_what_they_are_called() -> None:
    assert sum(BINOMIAL) == 1
    h = torch.tensor(SYM6, dtype=torch.float64)
    for shift in range(6):  # orthonormal to its even shifts
        assert (h[2 * shift :] * h[: 12 - 2 * shift]).sum().item() == pytest.approx(float(shift == 0), abs=1e-11)
    k = torch.arange(12, dtype=torch.float64)
    sign = 1 - 2 * (k % 2)
    for moment in range(6):  # and six vanishing moments: the symlet of 12 taps
        assert (sign * (k / 12) ** moment * h).sum().item() == pytest.approx(0, abs=1e-10)
    assert (sign * (k / 12) ** 6 * h).sum().abs() > 1e-5


def test_computes_in_the_type_of_its_input() -> None:
    x = _images(1, 2, 8, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert upsample(x).dtype == torch.float32
        assert torch.equal(upsample(x), upfirdn(x, filter_taps(BINOMIAL, x, 2), up=2, padding=(2, 1)))
        assert upsample(x.bfloat16()).dtype == torch.bfloat16
