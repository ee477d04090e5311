"""WaveNet: each sample sees those before it as far as the dilations reach, and caching changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.systems.tiny import SMALLER, random_batch

from bessemer.evaluation.sampling import sampling_mode
from bessemer.nn.mu_law import mu_law_decode, mu_law_encode
from bessemer.systems.autoregressive.wavenet import CachedSampler, WaveNet
from bessemer.systems.contract import Batch
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> WaveNet:
    system = build("wavenet", "tiny", {**SMALLER["wavenet"], **fields})
    assert isinstance(system, WaveNet)
    system.init_weights(g())
    return system


@pytest.mark.parametrize("fields", [{}, {"blocks": 1, "layers": 4}, {"blocks": 3, "layers": 2}])
def test_each_sample_sees_the_receptive_field_and_nothing_else(fields: dict[str, Any]) -> None:
    """By gradients; the field is 1 + Σ dilations of the stack, behind a first layer of two samples."""
    system = small(samples=40, **fields)
    c = system.config
    assert c.receptive_field == 2 + c.blocks * (2**c.layers - 1)
    x = torch.randn(1, c.levels, 40, generator=g(1)).requires_grad_()
    logits = system.wavenet(x, torch.zeros(1, dtype=torch.int64))
    for t in (0, 1, 2, 7, 23, 39):
        (gradient,) = torch.autograd.grad(logits[0, :, t].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(0).nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - c.receptive_field), t))


def test_the_papers_receptive_field() -> None:
    """About 300 milliseconds at 16 kHz (section 3.1)."""
    with torch.device("meta"):
        c = build("wavenet", "vctk").config
    assert c.receptive_field == 5117
    assert 0.3 < c.receptive_field / c.rate < 0.33


@pytest.mark.parametrize("preset", ["tiny", "vctk", "music"])
def test_sizes(preset: str) -> None:
    """Counted layer by layer."""
    with torch.device("meta"):
        system = build("wavenet", preset)
    assert isinstance(system, WaveNet)
    c = system.config
    r, d, s, q = c.width, c.gate_width, c.skip_width, c.levels
    layer = 2 * r * 2 * d + 2 * d + d * s + s + d * r + r + (c.classes * 2 * d if c.classes > 1 else 0)
    expected = 2 * q * r + r + c.blocks * c.layers * layer - (d * r + r) + s * s + s + s * q + q
    assert sum(p.numel() for p in system.wavenet.parameters()) == expected


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_network() -> None:
    """Past twice the receptive field, so that every memory has been written over; and in single precision."""
    system = small(samples=40)
    levels, labels = system.config.levels, torch.tensor([2, 0])
    codes = torch.randint(levels, (2, 40), generator=g(1))
    one_hot = torch.nn.functional.one_hot(codes, levels).mT
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        network = system.wavenet.to(dtype)
        whole = network(one_hot.to(dtype), labels)
        sampler = CachedSampler(network, labels)
        for t in range(40):
            difference = (sampler.logits() - whole[:, :, t]).abs().max().item()
            assert difference <= tolerance * max(1, whole.abs().max().item()), (dtype, t)
            sampler.set(codes[:, t])


def test_probabilities_of_all_sounds_sum_to_one() -> None:
    """4 levels and 6 samples: 4096 sounds."""
    system = small(levels=4, samples=6)
    codes = torch.tensor(list(itertools.product(range(4), repeat=6)))
    for label in range(3):
        batch = Batch(None, torch.full((len(codes),), label), audio=mu_law_decode(codes, 4))
        found = system.log_likelihood(batch, g())
        assert found.dtype == torch.float64
        assert torch.logsumexp(found, 0).item() == pytest.approx(0, abs=1e-5)


def test_samples_are_as_frequent_as_they_are_likely() -> None:
    """3 levels and 3 samples: 27 sounds, 20,000 draws; chi-squared with 26 degrees of freedom."""
    system = small(levels=3, samples=3)
    codes = torch.tensor(list(itertools.product(range(3), repeat=3)))
    labels = torch.ones(20_000, dtype=torch.int64)
    with sampling_mode(system):
        drawn = mu_law_encode(system.sample(labels, g(5)), 3)
    counts = torch.bincount((drawn * torch.tensor([9, 3, 1])).sum(1), minlength=27).double()
    p = system.log_likelihood(Batch(None, labels[:27], audio=mu_law_decode(codes, 3)), g()).exp()
    statistic = ((counts - 20_000 * p).square() / (20_000 * p)).sum().item()
    assert statistic < 60  # beyond it lies one draw in ten thousand


def test_classes_are_heard() -> None:
    system = small()
    batch = random_batch(system)
    found = [system.log_likelihood(Batch(None, torch.full((4,), k), audio=batch["audio"]), g()) for k in range(3)]
    assert not torch.allclose(found[0], found[1])
    alone = small(classes=1)
    assert not any("condition" in name for name, _ in alone.wavenet.named_parameters())


def test_the_loss_is_bits_per_sample() -> None:
    system = small()
    batch = random_batch(system)
    nats = -system.log_likelihood(batch, g()).mean().item()
    expected = nats / torch.log(torch.tensor(2.0)).item() / 24
    assert system.loss(batch, g()).value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 4, 256])
def test_mu_law(levels: int) -> None:
    codes = torch.arange(levels)
    values = mu_law_decode(codes, levels)
    assert torch.equal(mu_law_encode(values, levels), codes)
    assert values[0] == -1
    assert values[-1] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(values, -values.flip(0))
    assert (values.diff() > 0).all()
    x = torch.linspace(-1, 1, 10_001)
    nearest = mu_law_decode(mu_law_encode(x, levels), levels)
    assert (nearest - x).abs().max() <= values.diff().max()
    if levels == 256:  # by the formula, at a quarter
        assert mu_law_encode(torch.tensor(0.25), 256).item() == 223
        assert values.diff().min() < 2e-4 < 2e-2 < values.diff().max()
