"""InfoGAN's bound of the information in its codes; BiGAN's pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.systems.tiny import random_batch, tiny_system
from torch import Tensor
from torch.nn import functional as F

from bessemer.nn.normal import Normal
from bessemer.systems.adversarial.bigan import BiGAN
from bessemer.systems.adversarial.infogan import InfoGAN
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def infogan() -> InfoGAN:
    system = tiny_system("infogan")
    assert isinstance(system, InfoGAN)
    return system


def bigan() -> BiGAN:
    system = tiny_system("bigan")
    assert isinstance(system, BiGAN)
    return system


def test_the_bound_reaches_the_entropy_only_where_the_code_is_certain() -> None:
    system = infogan()
    category = torch.randint(10, (2000,), generator=g())
    codes = 2 * torch.rand(2000, 2, generator=g(1)) - 1

    def bound(logits: Tensor) -> float:
        q = Normal(torch.zeros_like(codes), torch.ones_like(codes))
        return system.information(logits, q, category, codes)[0].item()

    assert bound(torch.zeros(2000, 10)) == pytest.approx(0, abs=1e-5), "nothing is known"
    assert bound(100 * F.one_hot(category, 10).float()) == pytest.approx(math.log(10), abs=1e-5)
    for seed in range(5):
        assert bound(torch.randn(2000, 10, generator=g(seed))) < math.log(10)


def test_the_bound_of_continuous_codes_is_that_of_a_noisy_channel() -> None:
    """Codes seen through N(0, σ²): the bound with the true Q is H(c) - H(noise), nearly; a false Q gives less."""
    system, sigma = infogan(), 0.05
    codes = 2 * torch.rand(50_000, 2, generator=g()) - 1
    seen = codes + sigma * torch.randn(codes.shape, generator=g(1))
    logits, category = torch.zeros(50_000, 10), torch.zeros(50_000, dtype=torch.int64)
    found = [
        system.information(logits, Normal(seen, torch.full_like(seen, s)), category, codes)[1].item()
        for s in (sigma, 2 * sigma)
    ]
    expected = 2 * (math.log(2) - 0.5 * math.log(2 * math.pi * math.e * sigma**2))
    assert found[0] == pytest.approx(expected, abs=0.02)
    assert found[1] < found[0] - 0.3


def test_a_generator_that_shows_its_code_is_found_out() -> None:
    """Q learns to read the category from images that show it, and L_I comes near log 10."""
    system = infogan()
    optimizer = torch.optim.Adam(system.discriminator.parameters(), 1e-2)
    for i in range(150):
        category = torch.randint(10, (64,), generator=g(i))
        images = torch.full((64, 1, 16, 16), -1.0)
        images[torch.arange(64), 0, category] = 1.0  # one bright row
        _, logits, q = system.discriminator(images)
        information, _ = system.information(logits, q, category, torch.zeros(64, 2))
        optimizer.zero_grad()
        (-information).backward()
        optimizer.step()
    assert 0.7 * math.log(10) < information.item() <= math.log(10)


def test_q_shares_the_trunk() -> None:
    system = infogan()
    _, logits, _ = system.discriminator(random_batch(system).images)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in system.discriminator.trunk.parameters())
    assert all(p.grad is None for p in system.discriminator.score.parameters())


@pytest.mark.parametrize("name", ["infogan", "bigan"])
def test_sizes_of_the_papers_networks(name: str) -> None:
    """By arithmetic from the papers' tables: weights, biases, and two numbers for each batch-normalised feature."""

    def linear(i: int, o: int) -> int:
        return i * o + o

    if name == "infogan":
        G = linear(74, 1024) + 2 * 1024 + linear(1024, 6272) + 2 * 6272 + 128 * 64 * 16 + 64 + 2 * 64 + 64 * 16 + 1
        D = 16 * 64 + 64 + 64 * 128 * 16 + 128 + 2 * 128 + linear(6272, 1024) + 2 * 1024 + linear(1024, 1)
        Q = linear(1024, 128) + 2 * 128 + linear(128, 14)
        sizes = {"generator": G, "discriminator": D + Q}
    else:
        middle = linear(1024, 1024) + 2 * 1024
        sizes = {
            "generator": linear(50, 1024) + 2 * 1024 + middle + linear(1024, 784),
            "encoder": linear(784, 1024) + middle + linear(1024, 50),
            "discriminator": linear(834, 1024) + middle + linear(1024, 1),
        }
    with torch.device("meta"):
        system = build(name, "mnist")
    assert {k: sum(p.numel() for p in n.parameters()) for k, n in system.networks().items()} == sizes


def test_both_pairs_are_judged_by_the_same_discriminator() -> None:
    system = bigan()
    batch, draws = random_batch(system), g(3)
    z = 2 * torch.rand(4, system.config.latent_dim, generator=draws) - 1
    real = system.discriminator(torch.cat([batch.images.flatten(1), system.encoder(batch.images)], 1))
    fake = system.discriminator(torch.cat([system.generator(z).flatten(1), z], 1))
    expected = F.softplus(-real).mean() + F.softplus(fake).mean()
    torch.testing.assert_close(system.discriminator_loss(batch, g(3)).value, expected)
    torch.testing.assert_close(system.generator_loss(batch, g(3)).value, F.softplus(-fake).mean())
    torch.testing.assert_close(system.encoder_loss(batch, g(3)).value, F.softplus(real).mean())


def test_images_of_the_reconstruction_come_from_codes() -> None:
    system, seen = bigan(), list[Any]()
    batch = random_batch(system)
    system.generator.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for network in system.networks().values():
        network.eval()
    assert system.reconstruct(batch, g()).shape == batch.images.shape
    assert torch.equal(seen[0], system.encoder(batch.images))
