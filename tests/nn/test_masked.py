import pytest
import torch
from torch import Tensor

from bessemer.nn.init import init_weights
from bessemer.nn.masked import AutoregressiveShift


def _flow(channels: int = 3, *, mirror: bool = False) -> AutoregressiveShift:
    flow = AutoregressiveShift(channels, expansion=2, mirror=mirror).double()
    init_weights(flow, torch.Generator().manual_seed(1), "uniform")
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(3)
    return flow


def _z(n: int = 1, channels: int = 3, size: int = 4) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _jacobian(flow: AutoregressiveShift, z: Tensor) -> Tensor:
    """∂z'/∂z with elements in raster order, channels innermost."""
    found = torch.autograd.functional.jacobian(flow, z)[0, :, :, :, 0]
    return found.permute(1, 2, 0, 4, 5, 3).flatten(0, 2).flatten(1)


@pytest.mark.parametrize("mirror", [False, True])
def test_jacobian_is_triangular_with_ones_so_its_determinant_is_one(mirror: bool) -> None:
    jacobian = _jacobian(_flow(mirror=mirror), _z())
    assert len(jacobian) == 48
    outside = jacobian.tril(-1) if mirror else jacobian.triu(1)
    assert not outside.any()
    assert torch.equal(jacobian.diagonal(), torch.ones(48, dtype=torch.float64))
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-12
    inside = jacobian.triu(1) if mirror else jacobian.tril(-1)
    assert (inside != 0).sum() > 400, "elements must see what came before them"


def test_an_element_sees_every_earlier_neighbour() -> None:
    jacobian = _jacobian(_flow(), _z()).view(4, 4, 3, 4, 4, 3)
    seen = jacobian[2, 2, 2]
    assert all(seen[2, 2, c] != 0 for c in (0, 1))
    assert all((seen[y, x] != 0).all() for y, x in [(2, 1), (2, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 3)])


@pytest.mark.parametrize("mirror", [False, True])
def test_inverse(mirror: bool) -> None:
    flow, z = _flow(mirror=mirror), _z(2)
    moved = flow(z)
    assert (moved - z).abs().max() > 0.1
    torch.testing.assert_close(flow.inverse(moved), z, rtol=0, atol=1e-10)
