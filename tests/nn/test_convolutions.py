import torch
import torch.nn.functional as F
from torch import nn

from bessemer.nn.convolutions import Conv2d, Linear, WNConv2d
from bessemer.nn.init import init_weights


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weight_normalisation_is_torchs() -> None:
    layer = WNConv2d(6, 4, 3, groups=2, stride=2).double()
    init_weights(layer, _g(), "uniform")
    with torch.no_grad():
        layer.log_gain += torch.randn(4, 1, 1, 1, generator=_g(1))
    plain = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 3, 2, 1, groups=2).double(), dim=0)
    plain.parametrizations.weight.original0.data = layer.log_gain.data.exp()
    plain.parametrizations.weight.original1.data = layer.weight.data
    plain.bias.data = layer.bias.data  # type: ignore[union-attr]
    x = torch.randn(2, 6, 8, 8, generator=_g(2), dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.parametrizations.weight.original1.grad)


def test_training_starts_from_the_drawn_weights() -> None:
    layer = WNConv2d(3, 5, 3)
    init_weights(layer, _g(), "uniform")
    assert layer.weight.abs().max() <= 27**-0.5
    assert layer.weight.std() > 0.5 * 27**-0.5
    torch.testing.assert_close(layer.effective_weight(), layer.weight)


def test_constructors_draw_nothing() -> None:
    state = torch.get_rng_state()
    layers = [Conv2d(2, 2), WNConv2d(2, 2), Linear(2, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p.any() for layer in layers for p in layer.parameters())


def test_gradients_of_weights_that_are_zero_are_finite() -> None:
    layer = WNConv2d(2, 2)
    F.mse_loss(layer(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 4, 4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
