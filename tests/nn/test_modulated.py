import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.equalised import EqualisedConv2d, EqualisedLinear, Initialised
from bessemer.nn.modulated import ModulatedConv2d, modulated_conv2d


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_g(seed), dtype=torch.float64)


def _per_image(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, up: bool) -> Tensor:
    """Equations 1 and 3, each image and each output channel by itself; upsampling step by step."""
    out = []
    for image, style in zip(x, styles, strict=True):
        channels = []
        for filters in weight:
            w = filters * style[:, None, None]
            if demodulate:
                w = w / (w.square().sum() + 1e-8).sqrt()
            y = image
            if up:  # zeros between the pixels, all of the convolution, then the filter, cut to twice the size
                y = torch.zeros(len(image), 2 * image.shape[1], 2 * image.shape[2], dtype=image.dtype)
                y[:, ::2, ::2] = image
                y = F.conv2d(F.pad(y, (3, 2, 3, 2))[None], w[None])
                taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 4
                channels.append(F.conv2d(y, (taps[:, None] * taps)[None, None])[0, 0])
            else:
                channels.append(F.conv2d(y[None], w[None], padding=w.shape[-1] // 2)[0, 0])
        out.append(torch.stack(channels))
    return torch.stack(out)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("size", "up"), [(1, False), (3, False), (3, True)])
def test_both_forms_equal_a_convolution_per_image(size: int, up: bool, demodulate: bool) -> None:
    x, weight, styles = _randn(3, 4, 5, 6), _randn(2, 4, size, size, seed=1), _randn(3, 4, seed=2)
    expected = _per_image(x, weight, styles, demodulate, up)
    assert expected.shape == ((3, 2, 10, 12) if up else (3, 2, 5, 6))
    for fused in (True, False, None):
        actual = modulated_conv2d(x, weight, styles, demodulate=demodulate, up=up, fused=fused)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("up", [True, False])
def test_second_derivatives_of_both_forms(up: bool, fused: bool) -> None:
    x, weight, styles = (t.requires_grad_() for t in (_randn(2, 2, 3, 3), _randn(1, 2, 3, 3), _randn(2, 2)))
    assert torch.autograd.gradgradcheck(
        lambda x, w, s: modulated_conv2d(x, w, s, up=up, fused=fused), (x, weight, styles)
    )


def test_demodulated_outputs_have_unit_variance_whatever_the_style() -> None:
    x, weight = _randn(8, 32, 16, 16), _randn(16, 32, 3, 3, seed=1)
    styles = torch.exp(2 * _randn(8, 32, seed=2))
    y = modulated_conv2d(x, weight, styles)[:, :, 1:-1, 1:-1]
    assert y.std().item() == pytest.approx(1, abs=0.05)
    assert modulated_conv2d(x, weight, styles, demodulate=False).std() > 10


def test_half_precision_does_not_overflow_where_the_plain_product_would() -> None:
    x, weight, styles = 200 * _randn(2, 64, 4, 4), 40 * _randn(8, 64, 3, 3, seed=1), 30 * _randn(2, 64, seed=2)
    expected = modulated_conv2d(x, weight, styles)
    actual = modulated_conv2d(x.half(), weight.half(), styles.half())
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=0.01 * expected.std().item())


def test_layer_by_explicit_steps() -> None:
    layer = ModulatedConv2d(4, 3, 5).double()
    layer.init_weights(_g(3))
    layer.affine.init_weights(_g(4))
    with torch.no_grad():
        layer.noise_strength.fill_(0.7)  # type: ignore[union-attr]
        layer.bias.copy_(_randn(3, seed=6))
    x, w, noise = _randn(2, 4, 6, 6), _randn(2, 5, seed=1), _randn(2, 1, 6, 6, seed=2)
    styles = w @ layer.affine.weight.T / 5**0.5 + 1
    y = _per_image(x, layer.weight / 6, styles, True, False) + 0.7 * noise + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, w, noise), F.leaky_relu(y, 0.2) * 2**0.5)


def test_colour_layer_is_linear_and_scaled() -> None:
    layer = ModulatedConv2d(4, 3, 5, 1, colour=True).double()
    layer.init_weights(_g(3))
    layer.affine.init_weights(_g(4))
    x, w = _randn(2, 4, 6, 6), _randn(2, 5, seed=1)
    expected = _per_image(x, layer.weight / 2, layer.affine(w), False, False)
    torch.testing.assert_close(layer(x, w), expected)
    assert layer.noise_strength is None


@pytest.mark.parametrize("down", [True, False])
def test_equalised_convolution(down: bool) -> None:
    layer = EqualisedConv2d(4, 3, down=down, gain=0.5).double()
    layer.init_weights(_g())
    x, weight = _randn(2, 4, 6, 6), layer.weight / 6
    if down:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
        filtered = F.conv2d(F.pad(x, (2, 2, 2, 2)).flatten(0, 1)[:, None], (taps[:, None] * taps)[None, None])
        y = F.conv2d(filtered.view(2, 4, 7, 7), weight)[:, :, ::2, ::2]
    else:
        y = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(layer(x), F.leaky_relu(y, 0.2) * 0.5 * 2**0.5)


def test_equalised_rate_of_the_mapping_network() -> None:
    layer = EqualisedLinear(50, 60, lr_factor=0.01, activate=False)
    layer.init_weights(_g())
    assert layer.weight.std().item() == pytest.approx(100, rel=0.1)
    x = torch.randn(4, 50, generator=_g(1))
    torch.testing.assert_close(layer(x), x @ (layer.weight * 0.01 / 50**0.5).T)
    before = layer(x).detach()
    with torch.no_grad():  # a step of Adam moves each weight by the learning rate: here by 1% of that
        layer.weight += 0.002
    torch.testing.assert_close(layer(x) - before, 0.002 * 0.01 / 50**0.5 * x.sum(1, keepdim=True).expand(-1, 60))


def test_fp16_activations_are_clamped_and_others_not() -> None:
    layer = EqualisedConv2d(1, 1, 1, clamp=2.0)
    with torch.no_grad():
        layer.weight.fill_(100)
    x = torch.ones(1, 1, 2, 2)
    assert layer(x).max() > 100
    assert layer.half()(x.half()).max().item() == pytest.approx(2 * 2**0.5, rel=1e-3)


def test_layers_start_from_the_generator_handed_in_alone() -> None:
    layers: list[Initialised] = [EqualisedLinear(3, 4), EqualisedConv2d(3, 4), ModulatedConv2d(3, 4, 5)]
    for layer in layers:
        assert all((p == 0).all() for p in layer.parameters())
        state = torch.get_rng_state()
        layer.init_weights(_g(1))
        assert torch.equal(state, torch.get_rng_state())
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        assert weight.std() > 0.5
