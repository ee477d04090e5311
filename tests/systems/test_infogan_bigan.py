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


def test_the_bound_by_hand_for_a_q_that_is_sure_of_some_codes() -> None:
    system = infogan()
    mu, sigma = torch.tensor([[0.5, -0.25], [0.0, 0.75]]), torch.tensor([[0.1, 2.0], [1.0, 0.5]])
    codes = torch.tensor([[0.4, 0.25], [1.0, 0.5]])
    _, found = system.information(torch.zeros(2, 10), Normal(mu, sigma), torch.tensor([3, 4]), codes)
    density = torch.distributions.Normal(mu, sigma).log_prob(codes).sum(1).mean()
    assert found.item() == pytest.approx(density.item() + 2 * math.log(2), rel=1e-6)


def test_losses_of_d_and_g_hold_the_information_with_its_weights() -> None:
    system = infogan()
    assert (system.config.categorical_weight, system.config.continuous_weight) == (1.0, 0.1)
    batch, draws = random_batch(system), g(7)
    z, category = torch.randn(4, 4, generator=draws), torch.randint(10, (4,), generator=draws)
    codes = 2 * torch.rand(4, 2, generator=draws) - 1
    with torch.no_grad():
        fakes = system.generator(torch.cat([z, F.one_hot(category, 10).float(), codes], 1))
        fake, logits, q = system.discriminator(fakes)
        real, *_ = system.discriminator(batch.images)
        categorical = torch.log_softmax(logits, 1)[torch.arange(4), category].mean() + math.log(10)
        continuous = torch.distributions.Normal(q.mu, q.sigma).log_prob(codes).sum(1).mean() + 2 * math.log(2)
        found = categorical + 0.1 * continuous
        judged = -torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()
        torch.testing.assert_close(system.discriminator_loss(batch, g(7)).value, judged - found)
        torch.testing.assert_close(system.generator_loss(batch, g(7)).value, -torch.sigmoid(fake).log().mean() - found)


def test_q_shares_the_trunk() -> None:
    system = infogan()
    _, logits, _ = system.discriminator(random_batch(system).images)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in system.discriminator.trunk.parameters())
    assert all(p.grad is None for p in system.discriminator.score.parameters())


@pytest.mark.parametrize("name", ["infogan", "bigan"])
def test_sizes_of_the_papers_networks(name: str) -> None:
    """By arithmetic from InfoGAN's table (weights, biases, two numbers per normalised feature) and BiGAN's code."""

    def linear(i: int, o: int) -> int:
        return i * o + o

    if name == "infogan":
        G = linear(74, 1024) + 2 * 1024 + linear(1024, 6272) + 2 * 6272 + 128 * 64 * 16 + 64 + 2 * 64 + 64 * 16 + 1
        D = 16 * 64 + 64 + 64 * 128 * 16 + 128 + 2 * 128 + linear(6272, 1024) + 2 * 1024 + linear(1024, 1)
        Q = linear(1024, 128) + 2 * 128 + linear(128, 14)
        sizes = {"generator": G, "discriminator": D + Q}
    else:
        ways = 50 * 1024 + 1024 * 1024 + 1024 * 784  # neither biases nor gains
        sizes = {"generator": ways, "encoder": ways, "discriminator": ways + 1024}
    with torch.device("meta"):
        system = build(name, "mnist")
    assert {k: sum(p.numel() for p in n.parameters()) for k, n in system.networks().items()} == sizes


def test_both_pairs_are_judged_by_the_same_discriminator() -> None:
    system = bigan()
    batch, draws = random_batch(system), g(3)
    z = 2 * torch.rand(4, system.config.latent_dim, generator=draws) - 1
    real = system.discriminator(batch.images, system.encoder(batch.images))
    fake = system.discriminator(system.generator(z), z)
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
