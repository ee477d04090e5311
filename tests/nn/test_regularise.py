import torch
from torch import nn

from bessemer.nn.regularise import modified_orthogonal


def _network() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 5), nn.Embedding(4, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    return network


def test_value_and_gradient_are_those_of_the_definition() -> None:
    network = _network()
    value = modified_orthogonal(network)
    value.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for p in network.parameters():
        if p.ndim == 1:
            assert p.grad is None
            continue
        W = p.detach().flatten(1)
        off = (W @ W.T) * (1 - torch.eye(len(W), dtype=torch.float64))
        expected += torch.linalg.matrix_norm(off).square()
        torch.testing.assert_close(p.grad, (4 * off @ W).view_as(p))  # not half of it
    torch.testing.assert_close(value.detach(), expected)


def test_orthogonal_filters_cost_nothing_whatever_their_length() -> None:
    linear = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))[:4])
    assert modified_orthogonal(linear).item() == 0


def test_excluded_modules_are_left_alone() -> None:
    network = _network()
    modified_orthogonal(network, exclude=[network[2]]).backward()  # type: ignore[index]
    assert network[2].weight.grad is None  # type: ignore[index]
    assert network[1].weight.grad is not None  # type: ignore[index]
