import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.errors import SpecError
from bessemer.nn.update_state import begin_update, end_update
from bessemer.nn.upfirdn import downsample, upsample
from bessemer.systems.adversarial.stylegan2 import StyleGAN2
from bessemer.systems.adversarial.stylegan2_networks import minibatch_deviation
from bessemer.systems.contract import Batch, Clock, Update
from bessemer.systems.registry import build
from bessemer.training.optimizers import lazy_correction

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
SMALL = {
    "resolution": 16, "latent_dim": 6, "w_dim": 6, "channel_base": 64, "channel_max": 6, "minibatch_group": 2,
    "r1_gamma": 1.0, "augment_p": 0.7,
}  # fmt: skip


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small(**fields: object) -> StyleGAN2:
    system = build("stylegan2", "tiny32", overrides={**SMALL, **fields})
    assert isinstance(system, StyleGAN2)
    system.init_weights(_g(9))
    with torch.no_grad():  # noise counts from the start
        for key, p in system.generator.named_parameters():
            if key.endswith("noise_strength"):
                p.fill_(0.3)
    return system


def _double(**fields: object) -> StyleGAN2:
    system = _small(**fields)
    for network in system.networks().values():
        network.double()
    return system


def _batch(n: int = 4, seed: int = 5, channels: int = 3, dtype: torch.dtype = torch.float32) -> Batch:
    images = 2 * torch.rand(n, channels, 16, 16, generator=_g(seed), dtype=dtype) - 1
    return Batch(images, torch.randint(10, (n,), generator=_g(seed + 1)))


def _only(system: StyleGAN2, update: Update) -> None:
    for name, network in system.networks().items():
        network.requires_grad_(name == update.network)


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


def test_optimizers_and_their_correction() -> None:
    with torch.device("meta"):
        system = build("stylegan2", "config-f")
        cifar = build("stylegan2", "cifar")
    optimizers = system.optimizers()
    for network in ("generator", "discriminator"):
        o = optimizers[network]
        assert (o.name, o.lr, o.betas, o.eps) == ("adam", 0.002, (0.0, 0.99), 1e-8)
    updates = system.updates(Clock(0, 0))
    assert [(u.name, u.interval) for u in updates] == [
        ("generator", 1),
        ("path_length", 4),
        ("discriminator", 1),
        ("r1", 16),
    ]
    assert lazy_correction(updates, "generator") == pytest.approx(4 / 5)
    assert lazy_correction(updates, "discriminator") == pytest.approx(16 / 17)
    assert [u.name for u in cifar.updates(Clock(0, 0))] == ["generator", "discriminator", "r1"]


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


@pytest.mark.parametrize("of", ["generator", "discriminator"])
def test_mapping_by_explicit_steps(of: str) -> None:
    """z and the embedding of the class, each of mean square one, through layers at a hundredth of the rate."""
    system = _double(conditional=True, classes=10, mapping_layers=3)
    mapping: Any = system.networks()[of].mapping
    for name, p in mapping.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=30.0, generator=_g(len(name)))
    labels = torch.tensor([3, 9])
    x = _unit(mapping.embed.weight.T[labels] / 10**0.5 + mapping.embed.bias)
    z = torch.randn(2, 6, generator=_g(), dtype=torch.float64)
    x = torch.cat([_unit(z), x], 1) if of == "generator" else x
    for layer in mapping.layers:
        y = 0.01 * (x @ layer.weight.T / x.shape[1] ** 0.5 + layer.bias)
        x = torch.where(y > 0, y, 0.2 * y) * 2**0.5
    assert len(mapping.layers) == (3 if of == "generator" else 8)
    torch.testing.assert_close(mapping(z if of == "generator" else None, labels), x)


def test_conditional_scores_are_projections_on_the_class() -> None:
    D: Any = _double(conditional=True, classes=10).discriminator
    seen: list[Tensor] = []
    D.out.register_forward_hook(lambda module, args, out: seen.append(out))
    batch = _batch(dtype=torch.float64)
    scores = D(batch.images, batch.labels)
    expected = (seen[0] * _unit(D.mapping(None, batch.labels))).sum(1) / 6**0.5
    torch.testing.assert_close(scores, expected)


def test_synthesis_adds_upsampled_colours() -> None:
    system = _small()
    synthesis = system.generator.synthesis
    colours: list[Tensor] = []
    for block in synthesis.blocks:
        block.to_rgb.register_forward_hook(lambda module, args, out: colours.append(out))
    ws = torch.randn(2, synthesis.num_ws, 6, generator=_g())
    image = synthesis(ws, synthesis.draw_noise(2, _g(1)))
    a, b, c = colours
    torch.testing.assert_close(image, upsample(upsample(a) + b) + c)
    assert all(x.std() > 0 for x in colours)


def test_each_layer_has_its_own_w() -> None:
    synthesis = _small().generator.synthesis
    users: dict[int, list[str]] = {}
    layers = {name: m for name, m in synthesis.named_modules() if name.endswith(("convs.0", "convs.1", "to_rgb"))}
    seen: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, args[1]))
    ws = torch.randn(1, synthesis.num_ws, 6, generator=_g())
    synthesis(ws, synthesis.draw_noise(1, _g(1)))
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
    D = _double(discriminator=kind).discriminator
    batch = _batch(dtype=torch.float64)

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
    x = torch.randn(n, 3, 2, 4, generator=_g(), dtype=torch.float64)
    out = minibatch_deviation(x, group)
    assert out.shape == (n, 4, 2, 4)
    assert torch.equal(out[:, :3], x)
    groups = n // size
    for i in range(n):
        mates = torch.stack([x[j] for j in range(n) if j % groups == i % groups])
        assert len(mates) == size
        variance = ((mates - mates.mean(0)) ** 2).mean(0)
        torch.testing.assert_close(out[i, 3], ((variance + 1e-8) ** 0.5).mean().expand(2, 4))


def test_losses_by_hand() -> None:
    system, batch = _small(augment="none", style_mixing=0.0), _batch()
    G, D = system.generator, system.discriminator

    def fake(g: torch.Generator) -> Tensor:
        torch.randint(4, (4,), generator=g)  # labels, which these networks ignore
        w = G.mapping(torch.randn(4, 6, generator=g), batch.labels)
        return D(G.synthesis(G.broadcast(w), G.synthesis.draw_noise(4, g)), batch.labels)

    real, generated = torch.sigmoid(D(batch.images, batch.labels)), torch.sigmoid(fake(_g(2)))
    torch.testing.assert_close(system.generator_loss(batch, _g(2)).value, -generated.log().mean())
    loss = system.discriminator_loss(batch, _g(2))
    torch.testing.assert_close(loss.value, -real.log().mean() - (1 - generated).log().mean())
    assert not any(s.requires_grad or s.ndim for s in loss.scalars.values())


def test_style_mixing() -> None:
    system = _small(style_mixing=0.9)
    n, labels = 2000, torch.zeros(2000, dtype=torch.long)
    G, g = system.generator, _g(3)
    first, second = (G.mapping(torch.randn(n, 6, generator=g), labels) for _ in range(2))
    ws = system._ws(labels, _g(3))
    from_first = (ws == first[:, None]).all(2)
    assert torch.equal(torch.where(from_first[:, :, None], first[:, None], second[:, None]), ws)
    layers = from_first.sum(1)  # of six
    assert (from_first.long().diff(dim=1) <= 0).all(), "the first latent makes the first layers"
    assert (layers < 6).double().mean().item() == pytest.approx(0.9, abs=0.03)
    shares = torch.bincount(layers, minlength=7)[1:6] / (layers < 6).sum()
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.05)


def test_average_w_and_path_length_move_once_per_update() -> None:
    system = _small(style_mixing=0.9)
    G, labels = system.generator, torch.zeros(4, dtype=torch.long)
    networks = system.networks().values()
    z = [torch.randn(4, 6, generator=_g(i)) for i in range(3)]
    begin_update(networks)
    for one in z:
        G.map(one, labels)
    assert (G.w_average.mean == 0).all()
    end_update(networks)
    mean = torch.stack([G.mapping(one, labels).mean(0) for one in z]).mean(0)
    torch.testing.assert_close(G.w_average.mean, 0.005 * mean)
    before = G.w_average.mean.clone()
    for update in system.updates(Clock(0, 0)):
        begin_update(networks)
        loss = update.loss(_batch(), _g(1))
        end_update(networks)
        if update.name == "path_length":
            torch.testing.assert_close(G.path_length.mean, 0.01 * loss.scalars["path_length"][None])
        if update.name == "r1":
            assert torch.equal(G.w_average.mean, before), "no latents, no change"
        before = G.w_average.mean.clone()
    G.eval()
    begin_update(networks)
    system.sample(labels, _g())
    end_update(networks)
    assert torch.equal(G.w_average.mean, before)


def _numerical(value: Callable[[], float], p: Tensor, direction: Tensor, step: float = 1e-7) -> float:
    """Derivative of `value` along a direction; the step is small because leaky ReLUs have kinks."""
    values = []
    for sign in (1, -1):
        p.data.add_(direction, alpha=sign * step)
        values.append(value())
        p.data.add_(direction, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", ["r1", "path_length"])
@pytest.mark.parametrize("conditional", [False, True])
def test_second_order_losses_against_finite_differences(name: str, conditional: bool) -> None:
    system = _double(augment_p=1.0, conditional=conditional, classes=10)
    batch = _batch(2, dtype=torch.float64)
    (update,) = (u for u in system.updates(Clock(0, 0)) if u.name == name)
    _only(system, update)
    update.loss(batch, _g(1)).value.backward()
    checked = 0
    for i, (key, p) in enumerate(system.networks()[update.network].named_parameters()):
        assert p.grad is not None, key
        direction = torch.randn(p.shape, generator=_g(i), dtype=p.dtype) * (100 if "mapping" in key else 1)
        expected = _numerical(lambda: update.loss(batch, _g(1)).value.item(), p, direction)
        actual = (p.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=2e-3, abs=1e-5), key
        checked += abs(expected) > 1e-4
    assert checked >= 10, "most weights must matter for the comparison to mean something"


def test_r1_is_the_squared_gradient_at_the_image() -> None:
    system = _double(augment_p=1.0, r1_gamma=3.0, r1_interval=5, channels=1)
    batch, step = _batch(1, channels=1, dtype=torch.float64), 1e-5
    flat = batch.images.flatten()
    scores = []
    for sign in (1, -1):
        with torch.no_grad():
            moved = (flat + sign * step * torch.eye(len(flat), dtype=flat.dtype)).view(-1, 1, 1, 16, 16)
            scores.append(torch.stack([system._judge(m, batch.labels, _g(1))[0] for m in moved]))
    gradient = (scores[0] - scores[1]) / (2 * step)
    total = gradient.square().sum().item()
    assert system.r1_loss(batch, _g(1)).scalars["penalty/r1"].item() == pytest.approx(total, rel=1e-4)
    assert system.r1_loss(batch, _g(1)).value.item() == pytest.approx(5 * 3 / 2 * total, rel=1e-4)


def test_path_length_is_that_of_the_jacobian() -> None:
    system, batch = _double(style_mixing=0.0, path_length_shrink=2), _batch(2, dtype=torch.float64)
    G = system.generator
    with torch.no_grad():
        G.path_length.mean.fill_(0.2)
    loss = system.path_length_loss(batch, _g(1))
    g = _g(1)
    torch.randint(2, (1,), generator=g)
    ws = G.broadcast(G.mapping(torch.randn(1, 6, generator=g), batch.labels)).detach()
    noise = G.synthesis.draw_noise(1, g)
    y = torch.randn(1, 3, 16, 16, generator=g, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda w: G.synthesis(w, noise), ws)  # [1, 3, 16, 16, 1, 6, 6]
    finite = (G.synthesis(ws + 1e-6, noise) - G.synthesis(ws - 1e-6, noise)) / 2e-6
    torch.testing.assert_close(J.sum((4, 5, 6)), finite, rtol=1e-5, atol=1e-6)
    products = torch.einsum("nchwmld,nchw->ld", J, y) / 16
    length = products.square().sum(1).mean().sqrt()
    torch.testing.assert_close(loss.scalars["path_length"], length)
    torch.testing.assert_close(loss.value, 4 * 2 * (length - 0.2) ** 2)


def test_truncation() -> None:
    system = _small()
    G = system.generator.eval()
    G.w_average.mean.normal_(generator=_g(4))
    labels = torch.arange(6)
    torch.testing.assert_close(system.sample(labels, _g(1), 1.0), system.sample(labels, _g(1)))
    ws = G.broadcast(torch.ones(1, 6), 0.7)
    torch.testing.assert_close(ws, (0.3 * G.w_average.mean + 0.7).expand(1, 6, 6))
    noise = G.synthesis.draw_noise(1, _g(2))
    assert torch.equal(G.synthesis(ws, noise), G.synthesis(ws, noise))
    alone = G.synthesis(ws, noise)
    both = G.synthesis(ws.expand(2, -1, -1), noise)
    torch.testing.assert_close(both, alone.expand(2, -1, -1, -1))  # one image goes the fused way


def test_classes_count_where_the_networks_are_conditional() -> None:
    for conditional in (True, False):
        system = _small(conditional=conditional, classes=10)
        system.generator.eval()
        first, second = (system.sample(torch.tensor([label] * 2), _g()) for label in (0, 1))
        scores = [system.discriminator(first, torch.tensor([label] * 2)) for label in (0, 1)]
        assert torch.equal(first, second) != conditional
        assert torch.equal(*scores) != conditional
    with pytest.raises(SpecError, match="conditional true needs labels"):
        _small(conditional=True, classes=1)
    with pytest.raises(SpecError, match="augment bgc knows colours of 1 or 3"):
        _small(channels=4)


def test_p_moves_with_the_iterations_and_is_the_networks_state() -> None:
    system = _small(augment_p=0.0, augment_kimg=0.1, augment_interval=4, augment_target=-0.9)
    augment = system.discriminator.augment
    assert augment is not None
    values = []
    for iteration in range(1, 9):
        begin_update([system.discriminator])
        augment.observe(torch.ones(4))
        end_update([system.discriminator])
        system.after_iteration(Clock(nimg=4 * iteration, iteration=iteration))
        values.append(round(augment.p.item(), 6))
    assert values == [0, 0, 0, 0.16, 0.16, 0.16, 0.16, 0.32]
    names = set(system.discriminator.state_dict())
    assert {"augment.p", "augment.signs", "augment.count"} <= names
    fixed = _small(augment_target=None)
    fixed.discriminator.augment.observe(torch.ones(4))  # type: ignore[union-attr]
    fixed.after_iteration(Clock(16, 4))
    assert fixed.discriminator.augment.p.item() == pytest.approx(0.7)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_leaves_the_low_resolutions_alone(dtype: torch.dtype) -> None:
    system = _small(half_resolutions=1, augment_p=0.0, style_mixing=0.0)
    kinds: dict[str, torch.dtype] = {}
    for network, prefix in ((system.generator, "G"), (system.discriminator, "D")):
        for name, module in network.named_modules():
            if "conv" in name and "affine" not in name and not name.endswith("convs"):
                module.register_forward_hook(
                    lambda module, args, out, name=f"{prefix}.{name}": kinds.__setitem__(name, out.dtype)
                )
    for update in system.updates(Clock(0, 0)):
        _only(system, update)
        full = update.loss(_batch(), _g()).value
        with torch.autocast("cpu", dtype=dtype):
            half = update.loss(_batch(), _g()).value
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
