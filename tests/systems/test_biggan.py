import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.regularise import modified_orthogonal
from bessemer.nn.spectral import SpectralNorm, power_iterate
from bessemer.systems.adversarial.biggan import BigGAN
from bessemer.systems.adversarial.biggan_networks import BigGANDiscriminator, BigGANGenerator
from bessemer.systems.contract import Batch, Clock, System, Update
from bessemer.systems.registry import build

SMALL = {
    ("biggan", "tiny32"): {"generator_width": 2, "discriminator_width": 2, "latent_dim": 8, "shared_dim": 3},
    ("biggan-deep", "deep32"): {
        "generator_width": 2, "discriminator_width": 2, "latent_dim": 6, "shared_dim": 3,
        "generator_attention": (16,), "discriminator_attention": (8,), "orthogonal": 1e-4,
    },
}  # fmt: skip
BOTH = pytest.mark.parametrize("which", SMALL, ids=lambda which: which[0])


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small(which: tuple[str, str] = ("biggan", "tiny32"), **fields: object) -> BigGAN:
    system = build(*which, overrides={**SMALL[which], **fields})
    assert isinstance(system, BigGAN)
    system.init_weights(_g(9))
    return system


def _batch(n: int = 4, seed: int = 5, size: int = 32) -> Batch:
    images = 2 * torch.rand(n, 3, size, size, generator=_g(seed)) - 1
    return Batch(images, torch.randint(10, (n,), generator=_g(seed + 1)))


def _freeze_all_but(system: System, update: Update) -> None:
    for name, network in system.networks().items():
        network.requires_grad_(name == update.network)


def test_generator_block_is_the_papers() -> None:
    generator = _small().generator.double()
    block = generator.blocks[1]  # type: ignore[index]
    x = torch.randn(3, 8, 4, 4, generator=_g(), dtype=torch.float64)
    condition = torch.randn(3, 5, generator=_g(1), dtype=torch.float64)

    def conv(layer: nn.Module, h: Tensor, padding: int) -> Tensor:
        return F.conv2d(h, layer.normalised_weight(), layer.bias, padding=padding)  # type: ignore[operator,arg-type]

    h = F.interpolate(F.relu(block.norm1(x, condition)), scale_factor=2)
    h = conv(block.conv2, F.relu(block.norm2(conv(block.conv1, h, 1), condition)), 1)
    expected = h + conv(block.shortcut, F.interpolate(x, scale_factor=2), 0)
    torch.testing.assert_close(block(x, condition), expected)


def test_discriminator_by_explicit_steps() -> None:
    discriminator = _small(discriminator_attention=()).discriminator.double()
    batch = _batch()

    def conv(layer: nn.Module, h: Tensor, padding: int) -> Tensor:
        return F.conv2d(h, layer.normalised_weight(), layer.bias, padding=padding)  # type: ignore[operator,arg-type]

    x = batch.images.double()
    for i, block in enumerate(discriminator.blocks):  # type: ignore[arg-type,union-attr]
        h = conv(block.conv2, F.relu(conv(block.conv1, F.relu(x) if i else x, 1)), 1)
        x = conv(block.shortcut, x, 0) if block.shortcut is not None else x
        x = F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2) if i < 2 else h + x
    h = F.relu(x).sum((2, 3))
    linear, table = discriminator.linear, discriminator.embed
    expected = F.linear(h, linear.weight / linear.sigma(), linear.bias)[:, 0]  # type: ignore
    expected += ((table.weight / table.sigma())[batch.labels] * h).sum(1)  # type: ignore
    torch.testing.assert_close(discriminator(batch.images.double(), batch.labels), expected)


def _conv(layer: Any, h: Tensor, padding: int = 0) -> Tensor:
    return F.conv2d(h, layer.normalised_weight(), layer.bias, padding=padding)


DEEP64 = {"classes": 10, "latent_dim": 6, "shared_dim": 3, "generator_attention": (), "discriminator_attention": ()}


def test_deep_generator_by_explicit_steps() -> None:
    """Bottlenecks to a quarter; shortcuts drop the last channels. The whole of z joins every condition (figure 16b)."""
    system = build("biggan-deep", "deep64", {**DEEP64, "generator_width": 2})
    system.init_weights(_g(9))
    generator: Any = system.networks()["generator"].double()
    z, labels = torch.randn(3, 6, generator=_g(), dtype=torch.float64), torch.tensor([1, 0, 7])
    condition = torch.cat([z, generator.shared.weight[labels]], 1)
    x = F.linear(condition, generator.linear.normalised_weight(), generator.linear.bias).view(3, 32, 4, 4)
    widths = []
    for i, block in enumerate(generator.blocks):
        h = _conv(block.conv1, F.relu(block.norm1(x, condition)))
        assert h.shape[1] == x.shape[1] // 4
        h = F.relu(block.norm2(h, condition))
        h = _conv(block.conv2, h.repeat_interleave(2, 2).repeat_interleave(2, 3) if i % 2 else h, 1)
        h = _conv(block.conv3, F.relu(block.norm3(h, condition)), 1)
        h = _conv(block.conv4, F.relu(block.norm4(h, condition)))
        x = x[:, : h.shape[1]]
        x = h + (x.repeat_interleave(2, 2).repeat_interleave(2, 3) if i % 2 else x)
        widths.append(x.shape[1])
    assert widths == [32, 32, 32, 16, 16, 8, 8, 4]
    expected = torch.tanh(_conv(generator.conv, F.relu(generator.norm(x)), 1))
    torch.testing.assert_close(generator(z, labels), expected)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_deep_discriminator_by_explicit_steps(pooling: str) -> None:
    """Shortcuts are averaged, then get the missing channels from a convolution of themselves (figure 16c)."""
    system = build("biggan-deep", "deep64", {**DEEP64, "discriminator_width": 4, "pooling": pooling})
    system.init_weights(_g(9))
    discriminator: Any = system.networks()["discriminator"].double()
    batch = _batch(2, size=64)
    x = _conv(discriminator.stem, batch.images.double(), 1)
    for i, block in enumerate(discriminator.blocks):
        h = F.relu(_conv(block.conv1, F.relu(x)))
        h = F.relu(_conv(block.conv3, F.relu(_conv(block.conv2, h, 1)), 1))
        h, x = (F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)) if i % 2 == 0 else (h, x)
        h = _conv(block.conv4, h)
        x = h + (x if i % 2 else torch.cat([x, _conv(block.appended, x)], 1))
    assert x.shape == (2, 64, 4, 4)
    h = F.relu(x).sum((2, 3)) if pooling == "sum" else F.relu(x).mean((2, 3))
    linear, table = discriminator.linear, discriminator.embed
    expected = F.linear(h, linear.normalised_weight(), linear.bias)[:, 0]
    expected += (table.normalised_weight()[batch.labels] * h).sum(1)
    torch.testing.assert_close(discriminator(batch.images.double(), batch.labels), expected)


def test_chunks_of_the_latent_reach_only_their_block() -> None:
    generator = _small().generator
    assert isinstance(generator, BigGANGenerator)
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, inputs[-1])

    generator.linear.register_forward_hook(record("linear"))
    for i, block in enumerate(generator.blocks):
        block.register_forward_hook(record(f"block {i}"))
    places = ["linear", "block 0", "block 1", "block 2"]
    z, labels = torch.randn(2, 8, generator=_g()), torch.tensor([3, 4])
    generator(z, labels)
    before = dict(seen)
    assert torch.equal(before["linear"], z[:, :2])
    for i, place in enumerate(places[1:], 1):
        assert torch.equal(before[place], torch.cat([generator.shared(labels), z[:, 2 * i : 2 * i + 2]], 1))  # type: ignore
    for i, place in enumerate(places):
        changed = z.clone()
        changed[:, 2 * i : 2 * i + 2] += 1
        generator(changed, labels)
        assert [p for p in places if not torch.equal(seen[p], before[p])] == [place]


@BOTH
def test_hinge_losses_by_hand(which: tuple[str, str]) -> None:
    system, batch = _small(which), _batch()
    g = _g(2)
    z = torch.randn(4, system.config.latent_dim, generator=g)
    labels = torch.randint(10, (4,), generator=g)
    fake = system.discriminator(system.generator(z, labels), labels)  # two passes here, one in the system
    real = system.discriminator(batch.images, batch.labels)
    first = system.discriminator_loss(batch, _g(2))
    torch.testing.assert_close(first.value, torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    torch.testing.assert_close(first.scalars["scores/real"], real.mean().detach())
    torch.testing.assert_close(first.scalars["scores/fake"], fake.mean().detach())
    second = system.generator_loss(batch, _g(2))
    penalty = 1e-4 * modified_orthogonal(system.generator, exclude=[system.generator.shared])  # type: ignore[list-item]
    assert penalty > 0
    torch.testing.assert_close(second.value, penalty - fake.mean())
    assert not any(s.requires_grad or s.ndim for loss in (first, second) for s in loss.scalars.values())


def test_orthogonal_penalty_spares_the_shared_embedding() -> None:
    gradients = []
    for strength in (0.0, 1.0):
        system = _small(orthogonal=strength, init="normal")
        system.generator_loss(_batch(), _g()).value.backward()
        gradients.append({k: p.grad for k, p in system.generator.named_parameters()})
    same = {k for k, grad in gradients[0].items() if torch.equal(grad, gradients[1][k])}  # type: ignore[arg-type]
    # A vector, or a matrix of one row, has no pair of rows that could be at an angle.
    single = {k for k, p in system.generator.named_parameters() if p.ndim == 1 or p.shape[0] == 1}
    assert same == single | {"shared.weight"}


@BOTH
def test_classes_count_and_one_class_is_enough(which: tuple[str, str]) -> None:
    system = _small(which)
    system.generator.eval()
    torch.manual_seed(0)
    first, second = (system.sample(torch.tensor([label] * 2), _g()) for label in (0, 1))
    assert not torch.allclose(first, second)
    alone = _small(which, classes=1, channels=1)
    alone.generator.eval()
    assert alone.sample(torch.zeros(2, dtype=torch.long), _g()).shape == (2, 1, 32, 32)


@BOTH
def test_truncation_by_scaling_shrinks_every_latent(which: tuple[str, str]) -> None:
    system, labels = _small(which, truncation_by="scaling"), torch.arange(6)
    system.generator.eval()
    z = torch.randn(6, system.config.latent_dim, generator=_g(1))
    assert torch.equal(system.sample(labels, _g(1), 0.4), system.generator(0.4 * z, labels))
    assert torch.equal(system.sample(labels, _g(1)), system.generator(z, labels))
    assert not torch.equal(system.sample(labels, _g(1), 0.4), _small(which).sample(labels, _g(1), 0.4))


@BOTH
def test_without_classes_labels_do_not_count(which: tuple[str, str]) -> None:
    system = _small(which, conditional=False)
    assert not any("embed" in key or "shared" in key for n in system.networks().values() for key in n.state_dict())
    system.generator.eval()
    first, second = (system.sample(torch.full((2,), label), _g()) for label in (0, 1))
    assert torch.equal(first, second)
    x = _batch(2).images
    scores = [system.discriminator(x, torch.full((2,), label)) for label in (0, 1)]
    assert torch.equal(*scores)
    for update in system.updates(Clock(0, 0)):
        assert torch.isfinite(update.loss(_batch(), _g()).value)


def test_standing_statistics_equal_an_independent_average() -> None:
    system = _small(standing_passes=3, standing_batch=4)
    generator = system.generator.eval()
    assert isinstance(generator, BigGANGenerator)
    u = {k: v.clone() for k, v in generator.named_buffers() if k.endswith(".u")}
    labels = torch.tensor([1, 7, 7, 2, 0])
    inputs: list[Tensor] = []
    layer = generator.blocks[1].norm2
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    system.prepare_sampling(labels, _g(1), 0.6)
    handle.remove()
    assert len(inputs) == 3
    assert all(len(x) == 4 for x in inputs)
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))
    assert not generator.training
    assert all(torch.equal(v, generator.get_buffer(k)) for k, v in u.items()), "sampling must not move u"


def test_no_standing_passes_keep_the_running_statistics() -> None:
    system = _small(standing_passes=0)
    before = copy.deepcopy(system.generator.state_dict())
    system.prepare_sampling(torch.arange(3), _g())
    assert all(torch.equal(v, before[k]) for k, v in system.generator.state_dict().items())


def test_gradient_penalty_through_the_discriminator_against_finite_differences() -> None:
    system, batch = _small(), _batch(2)
    discriminator = system.discriminator.double()
    assert isinstance(discriminator, BigGANDiscriminator)
    with torch.no_grad():  # attention takes part
        for key, p in discriminator.named_parameters():
            if key.endswith("gamma"):
                p.fill_(0.5)
    # At convergence σ is the largest singular value, so the true derivative is that of u, v held constant.
    power_iterate(discriminator, 1000)

    def penalty() -> Tensor:
        x = batch.images.double().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x, batch.labels).sum(), x, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()

    parameters = {k: p for k, p in discriminator.named_parameters() if p.ndim > 1}
    gradients = dict(zip(parameters, torch.autograd.grad(penalty(), list(parameters.values())), strict=True))
    step, checked = 1e-6, 0
    for i, (key, p) in enumerate(parameters.items()):
        direction = torch.randn(p.shape, generator=_g(i), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            p.data.add_(direction, alpha=sign * step)
            values.append(penalty().item())
            p.data.add_(direction, alpha=-sign * step)
        expected = (values[0] - values[1]) / (2 * step)
        actual = (gradients[key] * direction).sum().item()
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-6 * abs(values[0])), key
        checked += abs(expected) > 1e-3 * abs(values[0])
    assert checked > len(parameters) // 2, "most weights must matter for the comparison to mean something"


@BOTH
def test_bfloat16_autocast_stays_close(which: tuple[str, str]) -> None:
    system = _small(which)
    for update in system.updates(Clock(0, 0)):
        _freeze_all_but(system, update)
        full = update.loss(_batch(), _g()).value
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = update.loss(_batch(), _g()).value
        half.backward()
        torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
        gradients = [p.grad for p in system.networks()[update.network].parameters()]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients)


def test_optimizers_are_the_launch_scripts() -> None:
    with torch.device("meta"):
        optimizers = build("biggan", "imagenet128").optimizers()
        thin = build("sngan", "imagenet128")
    assert {k: (o.name, o.lr, o.betas, o.eps) for k, o in optimizers.items()} == {
        "generator": ("adam", 1e-4, (0.0, 0.999), 1e-6),
        "discriminator": ("adam", 4e-4, (0.0, 0.999), 1e-6),
    }
    assert thin.optimizers()["generator"].betas == (0.0, 0.9)
    assert [(u.name, u.network, u.repeats) for u in _small(d_steps=3).updates(Clock(0, 0))] == [
        ("discriminator", "discriminator", 3),
        ("generator", "generator", 1),
    ]
    assert thin.updates(Clock(0, 0))[0].repeats == 5


def test_every_convolution_and_linear_layer_is_normalised() -> None:
    for which in SMALL:
        for network in _small(which).networks().values():
            for key, layer in network.named_modules():
                if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
                    assert isinstance(layer, SpectralNorm) == (key != "shared"), key
