"""The networks of StyleGAN2 against the reference's counts and against steps written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.systems.small_stylegan2 import batch_of, double, draws, only, small
from torch import Tensor

from bessemer.nn.upfirdn import downsample, upsample
from bessemer.systems.adversarial.stylegan2 import StyleGAN2
from bessemer.systems.adversarial.stylegan2_networks import minibatch_deviation
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build

# Parameters of mapping, synthesis and D, and vectors w, from instantiating StyleGAN2-ADA's reference code.
COUNTS = {
    "config-f": (2_101_248, 28_268_812, 29_012_513, 18),
    "paper1024": (2_101_248, 28_268_812, 29_012_513, 18),
    "paper512": (2_101_248, 28_175_335, 28_982_849, 16),
    "paper256": (2_101_248, 22_666_210, 24_001_089, 14),
    "auto1024": (525_312, 28_268_812, 29_012_513, 18),
    "auto512": (525_312, 28_175_335, 28_982_849, 16),
    "auto256": (525_312, 22_666_210, 24_001_089, 14),
    "auto128": (525_312, 22_423_965, 23_882_369, 12),
    "auto64": (525_312, 21_718_296, 23_407_361, 10),
    "auto32": (525_312, 19_422_227, 21_507_073, 8),
    "cifar": (525_312, 19_422_227, 20_720_641, 8),
    "cifar-conditional": (793_088, 19_422_227, 23_089_664, 8),
    "tiny32": (8_320, 255_667, 288_993, 8),  # our own
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        system = build("stylegan2", preset)
    assert isinstance(system, StyleGAN2)
    G = system.generator
    parts = (G.mapping, G.synthesis, system.discriminator)
    assert (*(sum(p.numel() for p in m.parameters()) for m in parts), G.synthesis.num_ws) == COUNTS[preset]
    assert all(p.ndim > 0 for m in system.networks().values() for p in m.parameters())


def test_every_preset_has_a_count_and_a_whole_network_at_256_too() -> None:
    assert set(COUNTS) == set(StyleGAN2.presets)
    with torch.device("meta"):
        wide = build("stylegan2", "config-f", {"resolution": 256}).networks().values()
    assert [sum(p.numel() for p in m.parameters()) for m in wide] == [30_034_338, 28_864_129]


@pytest.mark.parametrize("preset", ["config-f", "cifar-conditional"])
def test_shapes_on_the_meta_device(preset: str) -> None:
    with torch.device("meta"):
        system = build("stylegan2", preset)
        assert isinstance(system, StyleGAN2)
        G, size, labels = system.generator, system.config.resolution, torch.zeros(2, dtype=torch.long)
        sizes = [4, *(r for k in range(3, size.bit_length()) for r in (2**k, 2**k))]
        assert system.latent_shapes == {
            "latents": (512,), **{f"noise_{i}": (1, r, r) for i, r in enumerate(sizes)}
        }  # fmt: skip
        ws = G.broadcast(G.map(torch.randn(2, 512), labels))
        images = G.synthesis(ws, [torch.randn(2, 1, r, r) for r in sizes])
        assert images.shape == (2, 3, size, size)
        assert system.discriminator(images, labels).shape == (2,)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


@pytest.mark.parametrize("of", ["generator", "discriminator"])
def test_mapping_by_explicit_steps(of: str) -> None:
    """z and the embedding of the class, each of mean square one, through layers at a hundredth of the rate."""
    system = double(conditional=True, classes=10, mapping_layers=3)
    mapping: Any = system.networks()[of].mapping
    for name, p in mapping.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=30.0, generator=draws(len(name)))
    labels = torch.tensor([3, 9])
    x = _unit(mapping.embed.weight.T[labels] / 10**0.5 + mapping.embed.bias)
    z = torch.randn(2, 6, generator=draws(), dtype=torch.float64)
    x = torch.cat([_unit(z), x], 1) if of == "generator" else x
    for layer in mapping.layers:
        y = 0.01 * (x @ layer.weight.T / x.shape[1] ** 0.5 + layer.bias)
        x = torch.where(y > 0, y, 0.2 * y) * 2**0.5
    assert len(mapping.layers) == (3 if of == "generator" else 8)
    torch.testing.assert_close(mapping(z if of == "generator" else None, labels), x)


def test_conditional_scores_are_projections_on_the_class() -> None:
    D: Any = double(conditional=True, classes=10).discriminator
    seen: list[Tensor] = []
    D.out.register_forward_hook(lambda module, args, out: seen.append(out))
    batch = batch_of(dtype=torch.float64)
    scores = D(batch.images, batch.labels)
    expected = (seen[0] * _unit(D.mapping(None, batch.labels))).sum(1) / 6**0.5
    torch.testing.assert_close(scores, expected)


def test_synthesis_adds_upsampled_colours() -> None:
    system = small()
    synthesis = system.generator.synthesis
    colours: list[Tensor] = []
    for block in synthesis.blocks:
        block.to_rgb.register_forward_hook(lambda module, args, out: colours.append(out))
    ws = torch.randn(2, synthesis.num_ws, 6, generator=draws())
    image = synthesis(ws, synthesis.draw_noise(2, draws(1)))
    a, b, c = colours
    torch.testing.assert_close(image, upsample(upsample(a) + b) + c)
    assert all(x.std() > 0 for x in colours)


def test_each_layer_has_its_own_w() -> None:
    synthesis = small().generator.synthesis
    users: dict[int, list[str]] = {}
    layers = {name: m for name, m in synthesis.named_modules() if name.endswith(("convs.0", "convs.1", "to_rgb"))}
    seen: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, args[1]))
    ws = torch.randn(1, synthesis.num_ws, 6, generator=draws())
    synthesis(ws, synthesis.draw_noise(1, draws(1)))
    for name, w in seen.items():
        (index,) = (i for i in range(synthesis.num_ws) if torch.equal(ws[:, i], w))
        users.setdefault(index, []).append(name)
    assert users == {
        0: ["blocks.0.convs.0"],
        1: ["blocks.0.to_rgb", "blocks.1.convs.0"],
        2: ["blocks.1.convs.1"],
        3: ["blocks.1.to_rgb", "blocks.2.convs.0"],
        4: ["blocks.2.convs.1"],
        5: ["blocks.2.to_rgb"],
    }


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_discriminator_by_explicit_steps(kind: str) -> None:
    D = double(discriminator=kind).discriminator
    batch = batch_of(dtype=torch.float64)

    def conv(layer: torch.nn.Module, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, layer.weight / layer.weight[0].numel() ** 0.5, layer.bias, **options)  # type: ignore

    def lrelu(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2) * math.sqrt(2)

    x = batch.images
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps)[None, None]
    for block in D.blocks:
        if block.from_rgb is not None:
            x = lrelu(conv(block.from_rgb, x))
        y = lrelu(conv(block.conv1, x, padding=1))
        blurred = F.conv2d(F.pad(y, (2, 2, 2, 2)).flatten(0, 1)[:, None], kernel).unflatten(0, y.shape[:2])[:, :, 0]
        y = lrelu(conv(block.conv2, blurred, stride=2))
        x = (y + conv(block.skip, downsample(x))) / math.sqrt(2) if kind == "residual" else y
    x = lrelu(conv(D.conv, minibatch_deviation(x, 2), padding=1))
    x = lrelu(F.linear(x.flatten(1), D.linear.weight / (6 * 16) ** 0.5, D.linear.bias))
    expected = F.linear(x, D.out.weight / 6**0.5, D.out.bias)[:, 0]
    torch.testing.assert_close(D(batch.images, batch.labels), expected)


@pytest.mark.parametrize(("n", "group", "size"), [(6, 3, 3), (6, 4, 3), (5, 4, 1), (2, 32, 2), (8, 4, 4)])
def test_minibatch_deviation_by_loops(n: int, group: int, size: int) -> None:
    x = torch.randn(n, 3, 2, 4, generator=draws(), dtype=torch.float64)
    out = minibatch_deviation(x, group)
    assert out.shape == (n, 4, 2, 4)
    assert torch.equal(out[:, :3], x)
    groups = n // size
    for i in range(n):
        mates = torch.stack([x[j] for j in range(n) if j % groups == i % groups])
        assert len(mates) == size
        variance = ((mates - mates.mean(0)) ** 2).mean(0)
        torch.testing.assert_close(out[i, 3], ((variance + 1e-8) ** 0.5).mean().expand(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_leaves_the_low_resolutions_alone(dtype: torch.dtype) -> None:
    system = small(half_resolutions=1, augment_p=0.0, style_mixing=0.0)
    kinds: dict[str, torch.dtype] = {}
    for network, prefix in ((system.generator, "G"), (system.discriminator, "D")):
        for name, module in network.named_modules():
            if "conv" in name and "affine" not in name and not name.endswith("convs"):
                module.register_forward_hook(
                    lambda module, args, out, name=f"{prefix}.{name}": kinds.__setitem__(name, out.dtype)
                )
    for update in system.updates(Clock(0, 0)):
        only(system, update)
        full = update.loss(batch_of(), draws()).value
        with torch.autocast("cpu", dtype=dtype):
            half = update.loss(batch_of(), draws()).value
        half.backward()
        torch.testing.assert_close(half.float(), full, rtol=0.08, atol=0.05)
        gradients = [p.grad for p in system.networks()[update.network].parameters()]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients)
    in_half = {name for name, kind in kinds.items() if kind == dtype}
    assert in_half == {
        "G.synthesis.blocks.2.convs.0", "G.synthesis.blocks.2.convs.1", "D.blocks.0.conv1", "D.blocks.0.conv2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("resolution", "expected"), [(256, {32, 64, 128, 256}), (32, {8, 16, 32}), (16, {8, 16})], ids=str
)
def test_the_four_highest_resolutions_run_in_half_precision_but_never_the_lowest(
    resolution: int, expected: set[int]
) -> None:
    with torch.device("meta"):
        system = build("stylegan2", "config-f", {"resolution": resolution})
    assert isinstance(system, StyleGAN2)
    sizes = [2**k for k in range(2, resolution.bit_length())]
    blocks = zip(sizes, system.generator.synthesis.blocks, strict=True)
    assert {r for r, block in blocks if block.in_half} == expected
    halving = zip(reversed(sizes[1:]), system.discriminator.blocks, strict=True)
    assert {r for r, block in halving if block.in_half} == expected
