import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bessemer.nn.init import init_weights
from bessemer.nn.spectral import SNConv2d, SNEmbedding, SNLinear, SpectralNorm, power_iterate
from bessemer.nn.update_state import begin_update


def _layers() -> list[SpectralNorm]:
    layers: list[SpectralNorm] = [SNConv2d(6, 8), SNLinear(12, 5), SNEmbedding(9, 7)]
    for i, layer in enumerate(layers):
        init_weights(layer, torch.Generator().manual_seed(i), "normal")
        layer.double()
    return layers


def _largest(layer: SpectralNorm) -> torch.Tensor:
    return torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]


@pytest.mark.parametrize("layer", _layers(), ids=lambda layer: type(layer).__name__)
def test_sigma_rises_to_the_largest_singular_value(layer: SpectralNorm) -> None:
    before = layer.sigma().item()
    assert before < _largest(layer).item()
    power_iterate(layer, 1)
    assert before < layer.sigma().item()
    power_iterate(layer, 2000)
    torch.testing.assert_close(layer.sigma().detach(), _largest(layer))
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.normalised_weight().flatten(1), 2).item(), 1.0)


@pytest.mark.parametrize("layer", _layers(), ids=lambda layer: type(layer).__name__)
def test_gradient_of_the_normalised_weight(layer: SpectralNorm) -> None:
    power_iterate(layer, 2000)
    upstream = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (ours,) = torch.autograd.grad(layer.normalised_weight(), layer.weight, upstream)
    # Independently: W/σ(W) through the singular value decomposition.
    W = layer.weight.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(W / torch.linalg.svdvals(W.flatten(1))[0], W, upstream)
    torch.testing.assert_close(ours, theirs)


def test_before_convergence_the_gradient_is_miyatos_formula() -> None:
    layer = _layers()[1]
    power_iterate(layer, 1)
    W, u = layer.weight.detach(), layer.u
    v = F.normalize(W.T @ u, dim=0)
    left = F.normalize(W @ v, dim=0)
    sigma = left @ W @ v
    upstream = torch.linspace(-1, 1, W.numel(), dtype=torch.float64).view_as(W)
    (ours,) = torch.autograd.grad(layer.normalised_weight(), layer.weight, upstream)
    # Eq. 12 of the paper: (upstream - λ u vᵀ)/σ with λ = <upstream, W/σ>.
    torch.testing.assert_close(ours, (upstream - (upstream * W / sigma).sum() * torch.outer(left, v)) / sigma)


def test_u_moves_once_per_update_and_in_training_only() -> None:
    layer = SNLinear(6, 4)
    init_weights(layer, torch.Generator().manual_seed(0), "normal")
    W, u0 = layer.weight.detach(), layer.u.clone()
    assert not torch.isclose(u0.norm(), torch.tensor(1.0))
    x = torch.ones(2, 6)
    layer(x)
    assert torch.equal(layer.u, u0)
    begin_update([layer])
    torch.testing.assert_close(layer.u, F.normalize(W @ F.normalize(W.T @ u0, dim=0), dim=0))
    u1 = layer.u.clone()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer.u, u1)
    layer.eval()
    begin_update([layer])
    assert torch.equal(layer.u, u1)
    layer.train()
    in_training = layer(x)
    assert torch.equal(in_training, layer.eval()(x))


def test_sigma_does_not_depend_on_the_length_of_u() -> None:
    layer = _layers()[0]
    sigma = layer.sigma().item()
    layer.u.mul_(7)
    assert layer.sigma().item() == pytest.approx(sigma, rel=1e-12)


def test_forward_equals_the_plain_layer_with_the_weight_divided() -> None:
    conv, linear, table = _layers()
    g = torch.Generator().manual_seed(3)
    image = torch.randn(2, 6, 4, 4, generator=g, dtype=torch.float64)
    vector = torch.randn(2, 12, generator=g, dtype=torch.float64)
    index = torch.tensor([3, 0, 8])
    torch.testing.assert_close(conv(image), F.conv2d(image, conv.weight / conv.sigma(), conv.bias, padding=1))
    torch.testing.assert_close(linear(vector), F.linear(vector, linear.weight / linear.sigma(), linear.bias))
    torch.testing.assert_close(table(index), (table.weight / table.sigma())[index])


@pytest.mark.parametrize(("resample", "size"), [("up", 8), ("down", 2), (None, 4)])
def test_resampling_convolution(resample: str | None, size: int) -> None:
    layer = SNConv2d(6, 8, resample=resample)  # type: ignore[arg-type]
    plain = SNConv2d(6, 8)
    init_weights(layer, torch.Generator().manual_seed(0), "orthogonal")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = plain(F.interpolate(x, scale_factor=2) if resample == "up" else x)
    expected = F.avg_pool2d(expected, 2) if resample == "down" else expected
    assert expected.shape[-1] == size
    torch.testing.assert_close(layer(x), expected)


def test_sigma_stays_in_full_precision_under_autocast() -> None:
    layer = SNLinear(64, 64)
    init_weights(layer, torch.Generator().manual_seed(0), "normal")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sigma = layer.sigma()
        out = layer(torch.ones(1, 64))
    assert torch.equal(sigma, layer.sigma())
    assert out.dtype == torch.bfloat16


def test_state_is_the_plain_layers_plus_u() -> None:
    assert set(SNConv2d(2, 3).state_dict()) == set(nn.Conv2d(2, 3, 3).state_dict()) | {"u"}
