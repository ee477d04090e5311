"""Pix2Pix: sizes of the networks, what a patch sees, skips, dropout, jitter, and the losses written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.systems.tiny import random_batch, tiny_system
from torch import Tensor, nn

from bessemer.nn.instance_norm import InstanceNorm
from bessemer.nn.jitter import jitter
from bessemer.systems.contract import Batch
from bessemer.systems.registry import build
from bessemer.systems.translation.pix2pix import PatchDiscriminator, Pix2Pix, Pix2PixConfig, UNet


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: object) -> Pix2Pix:
    system = tiny_system("pix2pix", **fields)
    assert isinstance(system, Pix2Pix)
    return system


@pytest.mark.parametrize(
    ("preset", "discriminator"),
    [("facades", 2_768_705), ("edges2shoes", 2_768_705), ("facades-pixelgan", 9_024), ("facades-imagegan", 11_159_361)],
)
def test_parameter_counts(preset: str, discriminator: int) -> None:
    """54.414 and 2.769 millions are what the authors' PyTorch code prints of its networks."""
    with torch.device("meta"):
        networks = build("pix2pix", preset).networks()
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counts == {"generator": 54_413_955, "discriminator": discriminator}


@pytest.mark.parametrize(("layers", "patch", "image", "side"), [(0, 1, 32, 32), (1, 16, 64, 30), (3, 70, 256, 30)])
def test_a_score_sees_a_patch_of_the_papers_size(layers: int, patch: int, image: int, side: int) -> None:
    """By the gradient; normalisation, which sees the whole image, is left out."""
    D = PatchDiscriminator(6, 2, layers, affine=True)
    D.layers = nn.Sequential(*[m for m in D.layers if not isinstance(m, InstanceNorm)])
    for p in D.parameters():
        nn.init.uniform_(p, 0.1, 1.0, generator=g())
    x = torch.ones(1, 6, image, image, requires_grad=True)
    scores = D(x)
    assert scores.shape == (1, 1, side, side)
    scores[0, 0, side // 2, side // 2].backward()
    assert x.grad is not None
    seen = (x.grad[0, 0] != 0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [patch, patch]
    assert len(seen) == patch**2


def test_the_decoder_joins_the_encoders_maps_of_its_size() -> None:
    c = Pix2PixConfig(resolution=256, width=2)
    net, joined = UNet(c), list[tuple[int, ...]]()
    for layer in (*net.up, net.out):
        layer.register_forward_pre_hook(lambda _, inputs: joined.append(tuple(inputs[0].shape)))
    x = torch.rand(1, 3, 256, 256, generator=g())
    maps = net.encode(x)
    widths = [2, 4, 8, 16, 16, 16, 16, 16]
    assert [tuple(m.shape) for m in maps] == [(1, w, 128 >> i, 128 >> i) for i, w in enumerate(widths)]
    assert net(x, g()).shape == (1, 3, 256, 256)
    assert joined == [(1, 16, 1, 1)] + [(1, 2 * w, 128 >> i, 128 >> i) for i, w in reversed([*enumerate(widths)][:-1])]


def test_skips_carry_what_the_bottleneck_cannot() -> None:
    net = small().generator
    x = torch.rand(2, 3, 32, 32, generator=g())
    with torch.no_grad():
        for layer in net.up:  # nothing comes up from below
            layer.weight.zero_()
        a, b = net(x, g()), net(x.flip(3), g())
        h = F.relu(torch.cat([torch.zeros_like(m := net.down[0](x)), m], 1))
        torch.testing.assert_close(a, torch.tanh(net.out(h)))
    assert not torch.allclose(a, b)


def test_three_layers_of_the_decoder_are_dropped_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, shapes = torch.rand, list[tuple[int, ...]]()

    def counted(shape: torch.Size, **options: object) -> Tensor:
        shapes.append(tuple(shape))
        return draw(shape, **options)

    monkeypatch.setattr(torch, "rand", counted)
    net = UNet(Pix2PixConfig(resolution=256, width=1))
    net(torch.zeros(1, 3, 256, 256), g())
    assert shapes == [(1, 8, 2, 2), (1, 8, 4, 4), (1, 8, 8, 8)]


def test_dropout_is_the_noise_of_samples() -> None:
    system, batch = small(), random_batch(small(), 2)
    first, same, other = (system.sample_for(batch, g(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_instance_norm_is_of_one_image() -> None:
    x = 3 * torch.randn(4, 3, 5, 5, generator=g()) + 2
    layer = InstanceNorm(3, affine=True)
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([1.0, 2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.0, 1.0]))
    y = x.double().flatten(2)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = y * layer.gain.detach().double()[:, None] + layer.bias.detach().double()[:, None]
    torch.testing.assert_close(layer(x).double(), expected.view_as(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x[1:2]), layer.train()(x)[1:2])


def test_jitter_crops_a_pair_alike_and_each_elsewhere() -> None:
    x = torch.rand(6, 3, 8, 8, generator=g())
    a, b = jitter([x, x[:, :1]], 4, g(1))
    assert torch.equal(a[:, :1], b)
    large = F.interpolate(x, 12, mode="bilinear")
    places = []
    for i in range(6):
        found = [(r, c) for r in range(5) for c in range(5) if torch.equal(large[i, :, r : r + 8, c : c + 8], a[i])]
        assert len(found) == 1
        places += found
    assert len(set(places)) > 2
    assert torch.equal(jitter([x], 0, g())[0], x)
    many, _ = jitter([x[:1].expand(2000, -1, -1, -1), x[:1].expand(2000, -1, -1, -1)], 2, g())
    assert len(torch.unique(many, dim=0)) == 9, "every place is met"


def test_losses_are_the_papers() -> None:
    system = small(jitter=0)
    batch = random_batch(system, 3)
    x, y = batch.images.double(), batch["targets"].double()
    fake = system.generator(batch.images, g(5)).detach().double()
    real, made = (system.discriminator(batch.images, t.float()).double() for t in (y, fake))
    found = system.discriminator_loss(batch, g(5))
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    cross = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(found.value.double(), (cross(real, one) + cross(made, zero)) / 2, rtol=1e-5, atol=1e-6)
    found = system.generator_loss(batch, g(5))
    distance = (y - fake).abs().sum() / y.numel()
    torch.testing.assert_close(found.value.double(), cross(made, one) + 100 * distance, rtol=1e-5, atol=1e-5)
    assert found.scalars["distance/l1"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert x.shape[1] != y.shape[1], "inputs and targets may differ in channels"


def test_losses_do_not_depend_on_what_else_is_in_the_slice() -> None:
    system = small(jitter=0)
    batch = random_batch(system, 2)
    both = system.discriminator(batch.images, batch["targets"])
    alone = torch.cat([system.discriminator(batch.images[i : i + 1], batch["targets"][i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"resolution": 48}, "48 is no power of two"), ({"resolution": 32, "patch_layers": 4}, "need a resolution of 64")],
)
def test_shapes_that_do_not_fit_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pix2PixConfig(**fields)


@torch.no_grad()
def test_what_is_not_dropped_is_doubled_in_the_first_three_layers_of_the_decoder() -> None:
    system = build("pix2pix", "tiny32", {})
    assert isinstance(system, Pix2Pix)
    system.init_weights(torch.Generator().manual_seed(0))
    made: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    for norm in system.generator.up_norm:
        norm.register_forward_hook(lambda m, args, out: made.append(out))
    for layer in [*system.generator.up[1:], system.generator.out]:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    system.generator(images, torch.Generator().manual_seed(2))
    for i, (h, x) in enumerate(zip(made, seen, strict=True)):
        before, after = h.relu(), x[:, : h.shape[1]]
        kept = after > 0
        assert torch.equal(after[kept], before[kept] * (2 if i < 3 else 1))
        share = kept.sum() / (before > 0).sum()
        assert (0.4 < share < 0.6) if i < 3 else share == 1


def test_a_pair_is_jittered_alike() -> None:
    system = small(jitter=4, target_channels=3)
    x = random_batch(system, 8).images
    a, b = system._pair(Batch(x, torch.zeros(8, dtype=torch.long), targets=x), g())
    assert torch.equal(a, b)
    assert not torch.equal(a, x)
