"""Operations and memory of a slice, counted without computing it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bessemer.systems.contract import Batch, Clock, SystemConfig
from bessemer.systems.registry import build
from bessemer.training.costs import FlopCount, LiveBytes, _Work, slice_costs


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


def test_what_a_device_does_besides_matrix_products() -> None:
    x, dense, depthwise = torch.randn(2, 6, 8, 8), torch.randn(12, 6, 3, 3), torch.randn(6, 1, 5, 5)
    dense.requires_grad_()
    with _Work([x, dense, depthwise]) as work:
        y = F.conv2d(x, dense, padding=1)
        assert (work.kernels, work.moved, work.half) == (1, 0, 0)
        y.view(2, -1).detach()
        assert work.kernels == 1
        z = F.relu(y)
        assert (work.kernels, work.moved) == (2, 2 * y.nbytes)
        F.conv2d(x, depthwise, padding=2, groups=6)
        spread = 2 * y.nbytes + 2 * x.nbytes + depthwise.nbytes
        assert (work.kernels, work.moved) == (3, spread)
        before = work.total
        half = F.conv2d(x.bfloat16(), dense.bfloat16(), padding=1)
        assert work.half == work.total - before == 2 * 2 * 64 * dense.numel()
        assert work.moved == spread + 1.5 * (x.nbytes + dense.nbytes)  # read in fp32, written in bf16
        half.float().sum().backward()
    assert work.half == 2 * (work.total - before) / 2 == 2 * 2 * 2 * 64 * dense.numel()  # no gradient of x
    del z


def test_operations_of_nvae_are_those_of_its_layers() -> None:
    """Each weight meets each position once forwards and twice backwards, but no gradient of the images is asked for."""
    fields = {"width": 4, "groups": (2, 1), "flows": 1, "latent_channels": 2, "spectral": 0.0, "standing_passes": 0}
    system = build("nvae", "tiny32", fields)
    system.init_weights(torch.Generator().manual_seed(0))
    vae, n, products = system.networks()["vae"], 3, {}

    def count(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, out: torch.Tensor) -> None:
            positions = out.shape[2:].numel() if out.ndim == 4 else 1
            products[name] = n * positions * layer.weight.numel()

        return hook

    for name, layer in vae.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count(name))
    system.updates(Clock(0, 0))[0].loss(Batch(torch.zeros(n, 3, 32, 32), torch.zeros(n)), torch.Generator())
    assert len(products) > 50
    (cost,) = slice_costs(lambda: build("nvae", "tiny32", fields), n, accumulated=False, half=False)
    assert cost.flops == 2 * (3 * sum(products.values()) - products["stem"])
