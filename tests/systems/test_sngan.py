"""What sets SNGAN and SAGAN apart from BigGAN, with whom they share everything else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.attention import SelfAttention
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.spectral import SpectralNorm
from bessemer.systems.adversarial.biggan import BigGAN
from bessemer.systems.contract import Batch, Clock
from bessemer.systems.registry import build

SMALL = {"generator_width": 2, "discriminator_width": 2, "latent_dim": 6}


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small(name: str, preset: str, **fields: object) -> BigGAN:
    system = build(name, preset, {**SMALL, **fields})
    assert isinstance(system, BigGAN)
    system.init_weights(_g(9))
    return system


def _layers(network: nn.Module) -> dict[str, bool]:
    """Layers with weights -> whether they are spectrally normalised."""
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    return {k: isinstance(m, SpectralNorm) for k, m in network.named_modules() if isinstance(m, kinds)}


def test_sngan_normalises_the_discriminator_alone() -> None:
    system = _small("sngan", "cifar10-projection")
    assert not any(_layers(system.generator).values())
    assert all(_layers(system.discriminator).values())


def test_sagan_normalises_both() -> None:
    system = _small("sagan", "cifar10")
    assert all(_layers(system.discriminator).values())
    # Tables of gains and biases per class are as in BigGAN-PyTorch.
    plain = {k for k, normalised in _layers(system.generator).items() if not normalised}
    assert plain == {f"blocks.{i}.norm{j}.{table}" for i in range(3) for j in (1, 2) for table in ("gain", "bias")}


def test_the_unconditional_generator_by_explicit_steps() -> None:
    system = _small("sngan", "cifar10")
    generator = system.generator.double()
    z = torch.randn(3, 6, generator=_g(), dtype=torch.float64)

    def conv(layer: nn.Conv2d, h: Tensor) -> Tensor:
        return F.conv2d(h, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    def norm(layer: AffineBatchNorm, h: Tensor) -> Tensor:
        return F.relu(F.batch_norm(h, None, None, layer.gain, layer.bias, training=True, eps=layer.eps))

    x = F.linear(z, generator.linear.weight, generator.linear.bias).view(3, 8, 4, 4)  # type: ignore
    for block in generator.blocks:  # type: ignore[union-attr]
        h = conv(block.conv1, F.interpolate(norm(block.norm1, x), scale_factor=2))  # type: ignore
        h = conv(block.conv2, norm(block.norm2, h))  # type: ignore
        x = h + conv(block.shortcut, F.interpolate(x, scale_factor=2))  # type: ignore
    expected = torch.tanh(conv(generator.conv, norm(generator.norm, x)))  # type: ignore
    torch.testing.assert_close(generator(z, torch.zeros(3, dtype=torch.long)), expected)


def test_the_generator_learns_from_twice_as_many_images() -> None:
    system = _small("sngan", "cifar10-projection")
    seen: list[int] = []
    system.generator.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    batch = Batch(torch.zeros(3, 3, 32, 32), torch.zeros(3, dtype=torch.long))
    critic, *_, main = system.updates(Clock(0, 0))
    critic.loss(batch, _g())
    main.loss(batch, _g())
    assert (critic.repeats, seen) == (5, [3, 6])


@pytest.mark.parametrize("preset", ["imagenet128", "imagenet128-attn64", "cifar10"])
def test_sagan_attends_once_in_each_network_at_the_named_size(preset: str) -> None:
    system = _small("sagan", preset, classes=3, generator_width=8, discriminator_width=8)
    size = {"imagenet128": 32, "imagenet128-attn64": 64, "cifar10": 16}[preset]
    seen: list[int] = []
    for network in system.networks().values():
        for layer in network.modules():
            if isinstance(layer, SelfAttention):
                layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    labels = torch.zeros(1, dtype=torch.long)
    system.discriminator(system.generator.eval()(torch.zeros(1, 6), labels), labels)
    assert seen == [size, size]


def test_time_scales_of_sagan() -> None:
    with torch.device("meta"):
        optimizers = build("sagan", "imagenet128").optimizers()
    assert {k: (o.lr, o.betas) for k, o in optimizers.items()} == {
        "generator": (1e-4, (0.0, 0.9)),
        "discriminator": (4e-4, (0.0, 0.9)),
    }
