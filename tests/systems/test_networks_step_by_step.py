"""Networks of the smaller GANs against the papers' tables, written out layer by layer with functions of torch alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.systems.test_dvdgan import effective
from tests.systems.tiny import tiny_system
from torch import Tensor

from bessemer.nn.update_state import begin_update
from bessemer.systems.adversarial.progan import Growth
from bessemer.systems.contract import System

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # instance normalisation computes in float32


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def system_of(name: str, *, double: bool = True, **fields: Any) -> Any:
    """A small system whose gains and biases are not those that it starts with."""
    system: System = tiny_system(name, **fields)
    for network in system.networks().values():
        for i, p in enumerate(network.parameters()):
            if p.ndim == 1:
                p.data.add_(0.3 * torch.randn(p.shape, generator=g(i)))
        network.double() if double else network
        begin_update([network])
    return system


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=g(9), dtype=torch.float64)


def conv(layer: Any, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, **{"padding": layer.weight.shape[-1] // 2, **options})


def up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def half(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def batch_norm(layer: Any, x: Tensor) -> Tensor:
    axes = [0, *range(2, x.ndim)]
    mean, var = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    y = (x - mean) / (var + 1e-5).sqrt()
    if not hasattr(layer, "gain"):
        return y
    shape = (1, -1, *[1] * (x.ndim - 2))
    return y * layer.gain.view(shape) + layer.bias.view(shape)


def instance_norm(layer: Any, x: Tensor) -> Tensor:
    y = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return y if layer.gain is None else y * layer.gain.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def leaky(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def test_wgan_gp() -> None:
    system = system_of("wgan-gp", resolution=32)
    G, D = system.generator, system.critic
    z = normal(4, system.config.latent_dim)
    h = F.linear(z, G.linear.weight, G.linear.bias).view(4, -1, 4, 4)
    for block in G.blocks:
        branch = conv(block.conv1, up(batch_norm(block.norm1, h).relu()))
        h = conv(block.conv2, batch_norm(block.norm2, branch).relu()) + up(conv(block.shortcut, h))
    images = conv(G.conv, batch_norm(G.norm, h).relu()).tanh()
    torch.testing.assert_close(G(z), images, **EXACT)
    x = images.detach()
    h = half(conv(D.first.conv2, conv(D.first.conv1, x).relu())) + conv(D.first.shortcut, half(x))
    for block, down in zip(D.blocks, (True, False, False), strict=True):
        branch = conv(block.conv2, conv(block.conv1, h.relu()).relu())
        h = half(branch) + conv(block.shortcut, half(h)) if down else branch + h
    expected = F.linear(h.relu().mean((2, 3)), D.linear.weight, D.linear.bias)[:, 0]
    torch.testing.assert_close(D(x), expected, **EXACT)


def test_infogan() -> None:
    system = system_of("infogan")
    c, G, D = system.config, system.generator.layers, system.discriminator
    z = normal(4, c.latent_dim)
    h = batch_norm(G[1], F.linear(z, G[0].weight, G[0].bias)).relu()
    h = batch_norm(G[4], F.linear(h, G[3].weight, G[3].bias)).relu().view(4, 2 * c.width, 4, 4)
    h = batch_norm(G[8], F.conv_transpose2d(h, G[7].weight, G[7].bias, stride=2, padding=1)).relu()
    images = F.conv_transpose2d(h, G[10].weight, G[10].bias, stride=2, padding=1).tanh()
    torch.testing.assert_close(system.generator(z), images, **EXACT)
    T, Q = D.trunk, D.q
    h = leaky(conv(T[0], images, stride=2, padding=1), 0.1)
    h = leaky(batch_norm(T[3], conv(T[2], h, stride=2, padding=1)), 0.1).flatten(1)
    h = leaky(batch_norm(T[7], F.linear(h, T[6].weight, T[6].bias)), 0.1)
    scores, logits, codes = D(images)
    torch.testing.assert_close(scores, F.linear(h, D.score.weight, D.score.bias)[:, 0], **EXACT)
    h = leaky(batch_norm(Q[1], F.linear(h, Q[0].weight, Q[0].bias)), 0.1)
    q = F.linear(h, Q[3].weight, Q[3].bias).float()
    torch.testing.assert_close(logits, q[:, :10])
    torch.testing.assert_close(codes.mu, q[:, 10:12])
    torch.testing.assert_close(codes.sigma, q[:, 12:].exp())


def test_bigan() -> None:
    system = system_of("bigan")
    assert not [p for network in system.networks().values() for p in network.parameters() if p.ndim == 1]
    c, G, E, D = system.config, system.generator, system.encoder, system.discriminator
    z, x = normal(5, c.latent_dim), normal(5, 1, 8, 8).tanh()
    h = batch_norm(G[1], z @ G[0].weight.T).relu()
    h = batch_norm(G[4], h @ G[3].weight.T).relu()
    torch.testing.assert_close(G(z), (h @ G[6].weight.T).tanh().view(5, 1, 8, 8), **EXACT)
    h = leaky(x.flatten(1) @ E[1].weight.T, 0.2)
    h = leaky(batch_norm(E[4], h @ E[3].weight.T), 0.2)
    torch.testing.assert_close(E(x), h @ E[6].weight.T, **EXACT)
    h = leaky(x.flatten(1) @ D.image.weight.T, 0.2)
    h = leaky(batch_norm(D.norm, h @ D.hidden.weight.T + z @ D.latent.weight.T), 0.2)
    torch.testing.assert_close(D(x, z), (h @ D.out.weight.T)[:, 0], **EXACT)


def equalised(layer: Any, x: Tensor, *, activate: bool = True) -> Tensor:
    """He's constant, √2 over the root of the fan-in; the bias is √2 times the parameter."""
    gain = 2**0.5 if activate else 1.0
    W = layer.weight * gain / layer.weight[0].numel() ** 0.5
    bias = gain * layer.bias
    y = F.conv2d(x, W, bias, padding=W.shape[-1] // 2) if x.ndim == 4 else F.linear(x, W, bias)
    return leaky(y, 0.2) if activate else y


def pixel_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_progan(alpha: float) -> None:
    system = system_of("progan", minibatch_group=2)
    c, G, D, growth = system.config, system.generator, system.discriminator, Growth(1, alpha)
    z = normal(4, c.latent_dim)
    W = G.first.weight * (2**0.5 / 4) / c.latent_dim**0.5
    h = (pixel_norm(z) @ W.T).view(4, -1, 4, 4) + 2**0.5 * G.first.bias.view(1, -1, 1, 1)
    h = pixel_norm(equalised(G.conv, pixel_norm(leaky(h, 0.2))))
    old = up(equalised(G.to_rgb[0], h, activate=False))
    h = pixel_norm(equalised(G.blocks[0].conv1, up(h)))
    h = pixel_norm(equalised(G.blocks[0].conv2, h))
    images = alpha * equalised(G.to_rgb[1], h, activate=False) + (1 - alpha) * old
    torch.testing.assert_close(G(z, growth), images, **EXACT)
    x = images.detach()
    h = equalised(D.from_rgb[1], x)
    h = half(equalised(D.blocks[0][1], equalised(D.blocks[0][0], h)))
    h = alpha * h + (1 - alpha) * equalised(D.from_rgb[0], half(x))
    pairs = torch.stack([h[:2], h[2:]])  # image i and image i + 2
    deviation = (pairs.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3)).repeat(2)
    h = torch.cat([h, deviation.view(4, 1, 1, 1).expand(-1, -1, 4, 4)], 1)
    h = equalised(D.linear, equalised(D.conv, h).flatten(1))
    torch.testing.assert_close(D(x, growth), equalised(D.out, h, activate=False)[:, 0], **EXACT)


def test_cyclegan() -> None:
    system = system_of("cyclegan", double=False, blocks=2)
    layers = list(system.generator.g)
    x = normal(2, 3, 32, 32).float().tanh()

    def reflected(layer: Any, x: Tensor) -> Tensor:
        p = layer.weight.shape[-1] // 2
        left, right = x[..., 1 : p + 1].flip(3), x[..., -p - 1 : -1].flip(3)
        x = torch.cat([left, x, right], 3)
        top, bottom = x[..., 1 : p + 1, :].flip(2), x[..., -p - 1 : -1, :].flip(2)
        return conv(layer, torch.cat([top, x, bottom], 2), padding=0)

    h = instance_norm(layers[1], reflected(layers[0], x)).relu()
    for i in (3, 6):
        h = instance_norm(layers[i + 1], conv(layers[i], h, stride=2)).relu()
    for block in layers[9:11]:
        a, norm, _, b, last = block.layers
        h = h + instance_norm(last, reflected(b, instance_norm(norm, reflected(a, h)).relu()))
    for i in (11, 14):
        made = F.conv_transpose2d(h, layers[i].weight, layers[i].bias, stride=2, padding=1, output_padding=1)
        h = instance_norm(layers[i + 1], made).relu()
    torch.testing.assert_close(system.generator.g(x), reflected(layers[17], h).tanh(), **SINGLE)


@pytest.mark.parametrize("name", ["cyclegan", "pix2pix"])
def test_patch_discriminators(name: str) -> None:
    """C64-C128-C256-C512, the first not normalised, the last and the one after it without stride."""
    system = system_of(name, double=False, resolution=64, patch_layers=3)
    D = system.discriminator.x if name == "cyclegan" else system.discriminator
    layers = list(D.layers)
    x = normal(2, layers[0].weight.shape[1], 64, 64).float()
    h = leaky(conv(layers[0], x, stride=2, padding=1), 0.2)
    for i, stride in ((2, 2), (5, 2), (8, 1)):
        h = leaky(instance_norm(layers[i + 1], conv(layers[i], h, stride=stride, padding=1)), 0.2)
    torch.testing.assert_close(D(x), conv(layers[11], h, padding=1), **SINGLE)
    assert len(layers) == 12


def test_unet() -> None:
    """At 32 pixels: C-C-C-C-C down to one pixel, CD-CD-CD-C back, and the last layer."""
    system = system_of("pix2pix", double=False)
    G, draws = system.generator, g(4)
    x = normal(2, 3, 32, 32).float().tanh()
    maps = [conv(G.down[0], x, stride=2, padding=1)]
    for i in range(1, 5):
        h = conv(G.down[i], leaky(maps[-1], 0.2), stride=2, padding=1)
        maps.append(instance_norm(G.down_norm[i - 1], h) if i < 4 else h)
    h = maps.pop()
    for i in range(4):
        h = instance_norm(G.up_norm[i], F.conv_transpose2d(h.relu(), G.up[i].weight, None, stride=2, padding=1))
        if i < 3:
            h = h * (torch.rand(h.shape, generator=draws) >= 0.5) * 2
        h = torch.cat([h, maps.pop()], 1)
    expected = F.conv_transpose2d(h.relu(), G.out.weight, G.out.bias, stride=2, padding=1).tanh()
    torch.testing.assert_close(G(x, g(4)), expected, **SINGLE)


def test_dvdgan() -> None:
    system = system_of("dvdgan", latent_dim=5)
    G, D = system.generator, system.discriminator

    def weighed(layer: Any, x: Tensor) -> Tensor:
        W = effective(layer)
        convolve = F.conv3d if W.ndim == 5 else F.conv2d
        return convolve(x, W, layer.bias, padding=W.shape[-1] // 2)

    with torch.no_grad():
        z, labels = normal(3, 5), torch.tensor([0, 2, 1])
        condition = torch.cat([z, G.shared(labels)], 1)
        h = F.linear(condition, effective(G.linear), G.linear.bias).view(3, 1, -1, 4, 4)
        for stage in G.stages:
            h = stage.gru(h, 4).flatten(0, 1)
            for block, enlarged in ((stage.keep, lambda x: x), (stage.grow, up)):
                branch = weighed(block.conv1, enlarged(block.norm1(h, condition)))
                branch = weighed(block.conv2, block.norm2(branch, condition))
                h = branch + enlarged(h if block.shortcut is None else weighed(block.shortcut, h))
            h = h.view(3, 4, *h.shape[1:])
        frames = weighed(G.conv, G.norm(h.flatten(0, 1), condition)).tanh().view(3, 4, 1, 16, 16)
        torch.testing.assert_close(G(z, labels), frames, rtol=1e-5, atol=1e-6)

        def judged(judge: Any, clips: Tensor, cubic: int) -> Tensor:
            h = clips.transpose(1, 2)
            for i, block in enumerate(judge.blocks):
                if i == cubic:
                    times = h.shape[2]
                    h = h.transpose(1, 2).flatten(0, 1)
                branch = weighed(block.conv2, weighed(block.conv1, h if i == 0 else h.relu()).relu())
                if i < 2:  # the last of three blocks keeps all sizes
                    branch, h = half(branch), half(h)
                    if i < cubic:
                        branch, h = ((x[:, :, ::2] + x[:, :, 1::2]) / 2 for x in (branch, h))
                h = branch + (h if block.shortcut is None else weighed(block.shortcut, h))
            features = h.relu().sum((2, 3)).view(3, times, -1)
            by_class = effective(judge.embed)[labels]
            scores = features @ effective(judge.linear)[0] + judge.linear.bias + (features * by_class[:, None]).sum(2)
            return scores.sum(1)

        chosen = torch.tensor([[3, 1], [0, 2], [2, 3]])
        spatial, temporal = D(frames, chosen, labels)
        picked = torch.stack([clip[rows] for clip, rows in zip(frames, chosen, strict=True)])
        torch.testing.assert_close(spatial, judged(D.spatial, picked, 0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(temporal, judged(D.temporal, half(frames), 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "widths"),
    [("wgan-gp", {"generator_width": 16, "critic_width": 16}), ("sngan", {"discriminator_width": 4})],
)
def test_branches_of_residual_blocks_start_larger_by_the_root_of_2(name: str, widths: dict[str, int]) -> None:
    system: Any = tiny_system(name, **widths)
    for network in system.networks().values():
        blocks = [m for m in network.modules() if hasattr(m, "conv2")]
        assert len(blocks) >= 2
        branches = {id(conv) for block in blocks for conv in (block.conv1, block.conv2)}
        for layer in network.modules():
            if isinstance(weight := getattr(layer, "weight", None), torch.nn.Parameter) and weight.numel() > 500:
                taps = weight[0, 0].numel()
                bound = (6 / (taps * (weight.shape[0] + weight.shape[1]))) ** 0.5
                expected = bound * (2**0.5 if id(layer) in branches else 1)
                assert 0.97 * expected < weight.abs().max() <= expected * 1.0001, layer
        assert all(not p.any() for key, p in network.named_parameters() if key.endswith(".bias"))


@pytest.mark.parametrize("name", ["infogan", "cyclegan", "pix2pix"])
def test_weights_start_at_a_fiftieth_and_biases_at_0(name: str) -> None:
    system = tiny_system(name)
    weights = [p for n in system.networks().values() for k, p in n.named_parameters() if k.endswith("weight")]
    assert torch.cat([w.flatten() for w in weights]).std().item() == pytest.approx(0.02, rel=0.05)
    assert all(not p.any() for n in system.networks().values() for k, p in n.named_parameters() if k.endswith("bias"))
