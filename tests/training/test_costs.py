"""Operations and memory of a slice, counted without computing it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bessemer.systems.contract import Clock, SystemConfig
from bessemer.systems.registry import build
from bessemer.training.costs import FlopCount, LiveBytes, slice_costs


def test_memory_is_followed_from_birth_to_death() -> None:
    a = torch.zeros(1000)  # known: 4,000 bytes that do not count
    with LiveBytes([a]) as count:
        b = a + 1
        assert (count.live, count.peak) == (4000, 4000)
        view = b.view(10, 100)[2]
        del b
        assert count.live == 4000  # the view keeps it
        c = a.view(-1).double()
        assert count.live == 12_000
        del view
        assert (count.live, count.peak) == (8000, 12_000)
        c.add_(1)
        del c
        assert (count.live, count.peak) == (0, 12_000)


def test_the_peak_of_a_chain_is_what_backward_keeps() -> None:
    """Three layers of width 64 on 8 rows: each keeps its input for the gradient of its weights."""
    layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(64, 64, bias=False), nn.Tanh())])
    x = torch.randn(8, 64)
    row = x.nbytes
    with LiveBytes([x, *layers.parameters()]) as count:
        y = layers(x).sum()
        assert count.live == 3 * row + 4  # tanh keeps its output, which the next layer needs too
        del y
        assert count.live == 0


def test_counting_without_values_equals_counting_with_values(tiny: ModuleType) -> None:
    real = tiny.TinyGan(SystemConfig(resolution=2))
    costs = slice_costs(lambda: tiny.TinyGan(SystemConfig(resolution=2)), tiny.SLICE, accumulated=False, half=False)
    assert [cost.update.name for cost in costs] == ["discriminator", "r1", "generator"]
    for cost, update in zip(costs, real.updates(Clock(0, 0)), strict=True):
        for name, network in real.networks().items():
            network.train().requires_grad_(name == update.network)
        with FlopCount() as count:
            update.loss(tiny.real_slice(0, 0), tiny.generator("cpu", 0)).value.backward()
        weights = sum(p.nbytes for p in real.networks()[update.network].parameters())
        assert cost.flops == count.total
        assert cost.gradients == weights
        assert cost.peak > weights


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_convolutions_cost_twice_as_much_backward_as_forward(groups: int, transposed: bool) -> None:
    """Two gradients of as many operations each: every weight meets every position once."""
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    weight = torch.randn(6, 12 // groups, 3, 3) if transposed else torch.randn(12, 6 // groups, 3, 3)
    weight.requires_grad_()
    convolve = F.conv_transpose2d if transposed else F.conv2d
    with FlopCount() as count:
        out = convolve(x, weight, stride=2, padding=1, groups=groups)
        forward = count.total
        out.sum().backward()
    positions = 8 * 8 if transposed else 4 * 4
    assert forward == 2 * 2 * positions * weight.numel()
    assert count.total == 3 * forward


def test_a_slice_costs_by_its_images_and_a_penalty_by_its_order() -> None:
    def costs(images: int, *, half: bool = False, accumulated: bool = False) -> dict[str, tuple[int, int]]:
        found = slice_costs(
            lambda: build("biggan", "tiny32", {"r1_gamma": 1.0}), images, accumulated=accumulated, half=half
        )
        return {cost.update.name: (cost.flops, cost.peak) for cost in found}

    four, eight = costs(4), costs(8)
    for name in ("discriminator", "r1"):
        assert eight[name][0] == 2 * four[name][0]
        assert 1.5 < eight[name][1] / four[name][1] <= 2
    # R1 sees half the images of the discriminator's loss, and needs more memory all the same.
    assert eight["r1"][1] > eight["discriminator"][1]
    assert costs(8, half=True)["r1"][1] < eight["r1"][1]
    assert costs(8, accumulated=True)["generator"][1] > eight["generator"][1]
