"""PixelCNN++: nothing sees what comes after it, all probabilities sum to one, and caching changes nothing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.systems.tiny import random_batch

from bessemer.nn.likelihoods import quantise
from bessemer.systems.autoregressive.pixelcnnpp import CachedSampler, PixelCNNPP
from bessemer.systems.autoregressive.shifted import ShiftedConv2d, ShiftedDeconv2d
from bessemer.systems.contract import Batch
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> PixelCNNPP:
    system = build("pixelcnnpp", "tiny8", {"width": 4, "components": 2, **fields})
    assert isinstance(system, PixelCNNPP)
    system.init_weights(g())
    system.init_from_data(random_batch(system, 16), g())
    return system


@pytest.mark.parametrize(("preset", "count"), [("cifar10", 53_659_080), ("cifar10-80", 13_440_840)])
def test_sizes_of_the_papers_models(preset: str, count: int) -> None:
    with torch.device("meta"):
        network = build("pixelcnnpp", preset).networks()["pixelcnn"]
    assert sum(p.numel() for p in network.parameters()) == count


def test_each_pixel_sees_all_earlier_ones_and_no_other() -> None:
    """By gradients, in raster order. Far above to the right takes as many layers as the image is wide to reach."""
    system = small(layers=3)
    x = random_batch(system, 1).images.requires_grad_()
    parameters = system.pixelcnn(x)
    for row, column in itertools.product((0, 1, 3, 6), (0, 1, 4, 7)):
        (gradient,) = torch.autograd.grad(parameters[0, :, row, column].sum(), x, retain_graph=True)
        seen = gradient[0, 0].flatten() != 0
        position = 8 * row + column
        assert not seen[position:].any(), (row, column)
        assert seen[:position].all(), (row, column)


def test_probabilities_of_all_images_sum_to_one() -> None:
    """4×4 pixels of 1 bit: 65,536 images."""
    system = small(resolution=4, bits=1)
    bits = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
    images = (2 * bits.float() - 1).view(-1, 1, 4, 4)
    system.pixelcnn.eval()
    found = [
        system.log_likelihood(Batch(part, torch.zeros(len(part), dtype=torch.int64)), g())
        for part in images.split(8192)
    ]
    assert torch.logsumexp(torch.cat(found), 0).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("fields", [{}, {"channels": 3, "resolution": 12, "layers": 2}])
@torch.no_grad()
def test_cached_parameters_are_those_of_the_whole_network(fields: dict[str, Any]) -> None:
    system = small(**fields)
    x = random_batch(system, 2).images
    whole = system.pixelcnn(x)
    sampler = CachedSampler(system.pixelcnn, 2, system.config.resolution)
    side = system.config.resolution
    for row, column in itertools.product(range(side), repeat=2):
        pixel = (..., slice(row, row + 1), slice(column, column + 1))
        torch.testing.assert_close(
            sampler.parameters(row, column), whole[pixel], rtol=1e-4, atol=1e-4, msg=f"pixel {row}, {column}"
        )
        sampler.set(x[pixel], row, column)


def test_the_first_images_leave_convolutions_normalised() -> None:
    system = build("pixelcnnpp", "tiny8")
    assert isinstance(system, PixelCNNPP)
    system.init_weights(g())
    batch = random_batch(system, 32)
    system.init_from_data(batch, g())
    seen = []
    for layer in system.pixelcnn.modules():
        if isinstance(layer, (ShiftedConv2d, ShiftedDeconv2d)):
            layer.register_forward_hook(lambda m, args, out: seen.append((m.init_scale, out)))
    system.pixelcnn(batch.images)
    assert len(seen) > 20
    for scale, y in seen:
        assert y.mean((0, 2, 3)).abs().max() < 1e-3 * max(1, y.abs().max().item())
        torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.full((y.shape[1],), scale), rtol=0.02, atol=0)


@torch.no_grad()
def test_gains_are_lengths_of_the_weights_of_each_output() -> None:
    """By what a layer does to one pixel: the length of all answers of an output to each input is its gain."""
    for layer in (ShiftedConv2d(3, 5, (2, 3)), ShiftedDeconv2d(3, 5, (2, 3))):
        layer.init_weights(g())
        layer.log_gain.normal_(generator=g(1))
        x = torch.zeros(3, 3, 4, 4)
        for channel in range(3):
            x[channel, channel, 1, 1] = 1
        lengths = layer(x).square().sum((0, 2, 3)).sqrt()
        torch.testing.assert_close(lengths, layer.log_gain.exp().flatten())


@pytest.mark.parametrize("fields", [{}, {"channels": 3}])
@torch.no_grad()
def test_pixels_are_drawn_from_the_whole_networks_distribution(fields: dict[str, Any]) -> None:
    """With the same draws, given the pixels that were drawn before."""
    system = small(**fields)
    images, draws = system.sample(torch.zeros(3, dtype=torch.int64), g(4)), g(4)
    whole = system.pixelcnn(images)
    agree = []
    for row, column in itertools.product(range(8), repeat=2):
        pixel = (..., slice(row, row + 1), slice(column, column + 1))
        agree.append(torch.isclose(system._mixture(whole[pixel]).sample(draws), images[pixel]))
    assert torch.stack(agree).float().mean() > 0.98, (
        "but for draws so near to the border of a level that rounding decides"
    )


def test_the_loss_is_bits_per_dimension_of_the_highest_bits() -> None:
    system = small(dropout=0.0, bits=5)
    batch = random_batch(system)
    kept = Batch(quantise(batch.images, 5).add(1).mul(127.5).floor().div(127.5).sub(1), batch.labels)
    nats = system.log_likelihood(batch, g())
    torch.testing.assert_close(
        system.loss(batch, g()).value.item(), -nats.mean().item() / 64 / math.log(2), rtol=1e-5, atol=0
    )
    assert not torch.equal(kept.images, batch.images)
    torch.testing.assert_close(system.log_likelihood(kept, g()), nats)


def test_features_are_dropped_in_training_alone() -> None:
    system = small(dropout=0.5)
    batch = random_batch(system)
    losses = [system.loss(batch, g(seed)).value for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(system.log_likelihood(batch, g(1)), system.log_likelihood(batch, g(2)))
