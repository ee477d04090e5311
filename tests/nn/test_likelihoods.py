import itertools
import math

import pytest
import torch
from torch import Tensor

from bessemer.nn.likelihoods import Bernoulli, LogisticMixture, quantise

F64 = torch.float64


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _levels(bits: int) -> Tensor:
    steps = 2**bits - 1
    return torch.arange(steps + 1, dtype=F64) * 2 / steps - 1


def _all_pixels(bits: int, channels: int) -> Tensor:
    """[levels^channels, channels, 1, 1]"""
    return torch.cartesian_prod(*[_levels(bits)] * channels).view(-1, channels, 1, 1)


def _mixture(parameters: Tensor, n: int, channels: int, bits: int) -> LogisticMixture:
    return LogisticMixture(parameters.view(1, -1, 1, 1).expand(n, -1, -1, -1), channels=channels, bits=bits)


def _grey(logits: list[float], means: list[float], log_scales: list[float]) -> Tensor:
    return torch.tensor([*logits, *means, *log_scales], dtype=F64)


GREY = {
    "broad": _grey([0.3, -1.0], [0.7, -0.2], [-1.0, 0.5]),
    "near the right end": _grey([0.0], [0.992], [-6.0]),
    "near the left end": _grey([0.0], [-0.999], [-5.0]),
    "beyond the ends": _grey([0.0, 0.0], [1.5, -30.0], [-3.0, -1.0]),
    "sharper than the bound": _grey([0.0], [0.1], [-40.0]),
    "flat": _grey([0.0], [0.0], [12.0]),
}


@pytest.mark.parametrize("bits", [8, 5, 1])
@pytest.mark.parametrize("parameters", GREY.values(), ids=GREY)
def test_probabilities_of_grey_levels_sum_to_one(parameters: Tensor, bits: int) -> None:
    x = _all_pixels(bits, 1)
    masses = _mixture(parameters, len(x), 1, bits).log_prob(x).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("bits", [5, 2])
def test_probabilities_of_colours_sum_to_one(bits: int) -> None:
    parameters = torch.randn(30, generator=_g(bits), dtype=F64)
    x = _all_pixels(bits, 3)
    masses = _mixture(parameters, len(x), 3, bits).log_prob(x).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-10)


def test_eight_bit_colours_are_a_chain() -> None:
    """Summed over blue, p(r, g, b) leaves p(r)·p(g | r), which two grey distributions give."""
    parameters = torch.randn(10, generator=_g(1), dtype=F64)
    _, mean_r, log_scale_r, c0, mean_g, log_scale_g, *_ = parameters.tolist()
    for red, green in ((-1.0, 1.0), (253 / 255, -249 / 255)):
        x = torch.tensor([[red, green, v] for v in _levels(8).tolist()], dtype=F64).view(256, 3, 1, 1)
        expected = 1.0
        for value, mean, log_scale in (
            (red, mean_r, log_scale_r),
            (green, mean_g + math.tanh(c0) * red, log_scale_g),
        ):
            pixel = torch.full((1, 1, 1, 1), value, dtype=F64)
            expected *= _mixture(_grey([0.0], [mean], [log_scale]), 1, 1, 8).log_prob(pixel).exp().item()
        assert _mixture(parameters, 256, 3, 8).log_prob(x).exp().sum().item() == pytest.approx(expected, rel=1e-10)


def test_log_probability_by_hand() -> None:
    """σ of the upper edge minus σ of the lower one, component by component and colour by colour."""
    k, bits = 2, 8
    parameters = torch.randn(2, 10 * k, 2, 1, generator=_g(), dtype=F64)
    x = quantise(2 * torch.rand(2, 3, 2, 1, generator=_g(1), dtype=F64) - 1, bits)
    x[0, 0, 0, 0], x[1, 2, 1, 0] = -1.0, 1.0

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    for n in range(2):
        total = 0.0
        for h in range(2):
            p = parameters[n, :, h, 0].tolist()
            rgb = x[n, :, h, 0].tolist()
            weights = torch.softmax(torch.tensor(p[:k], dtype=F64), 0).tolist()
            mass = 0.0
            for j in range(k):
                colour = [p[k + c * 3 * k :][: 3 * k] for c in range(3)]
                c0, c1, c2 = (math.tanh(colour[c][2 * k + j]) for c in range(3))
                shifts = [0.0, c0 * rgb[0], c1 * rgb[0] + c2 * rgb[1]]
                product = weights[j]
                for c in range(3):
                    mean, scale = colour[c][j] + shifts[c], math.exp(colour[c][k + j])
                    upper = 1.0 if rgb[c] > 0.999 else sigmoid((rgb[c] + 1 / 255 - mean) / scale)
                    lower = 0.0 if rgb[c] < -0.999 else sigmoid((rgb[c] - 1 / 255 - mean) / scale)
                    product *= upper - lower
                mass += product
            total += math.log(mass)
        found = LogisticMixture(parameters, channels=3, bits=bits).log_prob(x)[n].item()
        assert found == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_have_the_probabilities(channels: int) -> None:
    n, bits = 40_000, 2
    parameters = torch.randn(2 * (10 if channels == 3 else 3), generator=_g(channels), dtype=F64)
    drawn = _mixture(parameters, n, channels, bits).sample(_g(5))
    x = _all_pixels(bits, channels)
    masses = _mixture(parameters, len(x), channels, bits).log_prob(x).exp()
    for value, mass in zip(x, masses.tolist(), strict=True):
        share = torch.isclose(drawn, value).flatten(1).all(1).double().mean().item()
        assert abs(share - mass) < 5 * math.sqrt(mass * (1 - mass) / n) + 1e-9


def test_the_mean_is_that_of_the_draws() -> None:
    parameters = torch.randn(20, generator=_g(3), dtype=F64) * 0.3
    parameters.view(10, 2)[[2, 5, 8]] = -3.0  # log scales so small that few draws leave [-1, 1]
    mixture = _mixture(parameters, 20_000, 3, 8)
    torch.testing.assert_close(mixture.sample(_g()).mean(0), mixture.mean()[0], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "means", [[0.1, -0.4, 0.3, 0.2, -0.3, 0.4], [2.0, -3.0, 0.6, 0.2, -0.2, 0.5], [0.9, -0.8, 1.4, -0.9, -2.5, 1.0]]
)
def test_the_mean_by_enumeration(means: list[float]) -> None:
    """Σ x·p(x) over all colours of 5 bits. A red beyond 1 moves green and blue as a red of 1 does."""
    k, bits = 2, 5
    parameters = torch.zeros(10 * k, dtype=F64)
    parameters[:k] = torch.tensor([0.4, -0.2])
    own = parameters[k:].view(3, 3, k)
    own[:, 0] = torch.tensor(means, dtype=F64).view(3, k)
    own[:, 1] = torch.tensor([[-2.0, -2.5], [-3.0, -1.5], [-2.0, -3.0]])
    own[:, 2] = torch.tensor([[1.5, -0.7], [-1.2, 0.9], [0.8, 1.1]])
    x = _all_pixels(bits, 3)
    masses = _mixture(parameters, len(x), 3, bits).log_prob(x).exp()
    expected = (masses[:, None] * x[:, :, 0, 0]).sum(0)
    mean = _mixture(parameters, 1, 3, bits).mean()[0, :, 0, 0]
    torch.testing.assert_close(mean[0], expected[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("log_scale", [-2.0, 0.0, math.log(7.99), math.log(8.01), 5.0, 11.0])
def test_the_mean_of_grey_levels_by_enumeration(log_scale: float) -> None:
    x = _all_pixels(8, 1)
    for mean in (-1.3, 0.0, 0.4, 40.0):
        grey = _grey([0.0], [mean], [log_scale])
        expected = _mixture(grey, 256, 1, 8).log_prob(x).exp() @ x.flatten()
        for dtype, error in ((F64, 2e-5), (torch.float32, 2.5e-5)):
            found = _mixture(grey.to(dtype), 1, 1, 8).mean().double().squeeze()
            torch.testing.assert_close(found, expected, rtol=0, atol=error)


def test_gradients_stay_finite_at_the_extremes() -> None:
    parameters = torch.tensor([0.0, 80.0, -60.0], requires_grad=True)
    for log_scale in (-60.0, 60.0):
        p = torch.cat([parameters[:2], torch.tensor([log_scale])]).view(1, 3, 1, 1)
        value = LogisticMixture(p, channels=1).log_prob(torch.full((1, 1, 1, 1), -1.0))
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        assert gradient.isfinite().all()


def test_quantised_images() -> None:
    pixels = torch.arange(256, dtype=torch.float32)
    images = (pixels / 127.5 - 1).view(1, 1, 16, 16)
    torch.testing.assert_close(quantise(images, 8), images)
    five = quantise(images, 5)
    torch.testing.assert_close(five, 2 * torch.floor(pixels / 8).view(1, 1, 16, 16) / 31 - 1)
    assert len(five.unique()) == 32


def test_bernoulli() -> None:
    logits = torch.randn(1, 1, 2, 2, generator=_g(), dtype=F64)
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=F64).view(16, 1, 2, 2)
    masses = Bernoulli(logits.expand(16, -1, -1, -1)).log_prob(images).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-12)
    drawn = Bernoulli(logits.expand(20_000, -1, -1, -1)).sample(_g(1))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(drawn.mean(0).double(), Bernoulli(logits).mean()[0], atol=0.04, rtol=0)
