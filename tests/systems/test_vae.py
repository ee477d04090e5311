"""The VAE: its bound against a model whose likelihood is known, and its loss by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from tests.systems.tiny import random_batch
from torch import Tensor

from bessemer.nn.dequantise import dequantise, log_volume, undo_dequantise
from bessemer.nn.likelihoods import quantise
from bessemer.systems.autoencoding.vae import VAE
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> VAE:
    system = build("vae", "tiny8", {"latent_dim": 3, "hidden": 16, **fields})
    assert isinstance(system, VAE)
    system.init_weights(g())
    return system


def linear_gaussian(wrong: float) -> tuple[VAE, Tensor, Tensor]:
    """x = Wz + μ + σε with W of orthogonal columns, an encoder that is its posterior but for `wrong`; log p(x)."""
    system = small(resolution=3, output="normal", layers=0)
    W = torch.linalg.qr(torch.randn(9, 3, generator=g(1)))[0] * torch.tensor([1.5, 1.0, 0.5])
    mu, sigma = torch.randn(9, generator=g(2)), 0.4
    precision = W.T @ W / sigma**2 + torch.eye(3)
    gain = torch.linalg.inv(precision) @ W.T / sigma**2
    with torch.no_grad():
        system.vae.log_sigma.fill_(math.log(sigma))
        decoder, encoder = system.vae.decoder[0], system.vae.encoder[1]
        decoder.weight.copy_(W)  # type: ignore[operator,union-attr]
        decoder.bias.copy_(mu)  # type: ignore[operator,union-attr]
        encoder.weight.copy_(torch.cat([gain, torch.zeros(3, 9)]))  # type: ignore[operator,union-attr]
        encoder.bias.copy_(torch.cat([-gain @ mu + wrong, -0.5 * precision.diagonal().log() + wrong]))  # type: ignore[operator,union-attr]
    x = torch.randn(50, 3, generator=g(3)) @ W.T + mu + sigma * torch.randn(50, 9, generator=g(4))
    covariance = W @ W.T + sigma**2 * torch.eye(9)
    exact = torch.distributions.MultivariateNormal(mu.double(), covariance.double()).log_prob(x.double())
    return system, x.view(-1, 1, 3, 3), exact + log_volume(9, 8)


def test_the_bound_is_tight_where_the_posterior_is_exact() -> None:
    system, x, exact = linear_gaussian(wrong=0.0)
    torch.testing.assert_close(system.bound(x, g(), 1), exact, rtol=0, atol=1e-4)


def test_elbo_importance_weighted_bound_and_likelihood_are_ordered() -> None:
    system, x, exact = linear_gaussian(wrong=0.3)
    bounds = [torch.stack([system.bound(x, g(i), k) for i in range(20)]).mean() for k in (1, 10, 200)]
    assert bounds[0] < bounds[1] - 0.02
    assert bounds[1] < bounds[2]
    assert bounds[2] < exact.mean() + 1e-3
    torch.testing.assert_close(bounds[2], exact.mean(), rtol=0, atol=0.03)


def test_loss_by_hand() -> None:
    system = small(beta=3.0)
    batch = random_batch(system, 5)
    loss = system.updates(Clock(0, 0))[0].loss(batch, g(7))
    draws = g(7)
    x = (torch.rand(5, 1, 8, 8, generator=draws) < (batch.images + 1) / 2).float()
    mu, log_sigma = system.vae.encoder(2 * x - 1).chunk(2, 1)
    z = mu + log_sigma.exp() * torch.randn(5, 3, generator=draws)
    p = torch.sigmoid(system.vae.decoder(z))
    cross_entropy = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3)).mean()
    kl = -0.5 * (1 + 2 * log_sigma - mu**2 - (2 * log_sigma).exp()).sum(1).mean()
    torch.testing.assert_close(loss.value, cross_entropy + 3 * kl)
    torch.testing.assert_close(loss.scalars["elbo/kl"], kl.detach())
    torch.testing.assert_close(loss.scalars["elbo/bits_per_dim"], (cross_entropy + kl).detach() / 64 / math.log(2))


def test_capacity_rises_with_the_clock() -> None:
    system = small(beta=100.0, capacity=20.0, capacity_kimg=10.0)
    batch = random_batch(system)
    for nimg, expected in ((0, 0.0), (5000, 10.0), (90_000, 20.0)):
        loss = system.updates(Clock(nimg, 0))[0].loss(batch, g())
        kl, reconstruction = loss.scalars["elbo/kl"], loss.scalars["elbo/reconstruction"]
        torch.testing.assert_close(loss.value.detach(), reconstruction + 100 * (kl - expected).abs())


def test_more_beta_less_information() -> None:
    found = []
    for beta in (0.2, 5.0):
        system = small(beta=beta, binarise="threshold")
        optimizer = torch.optim.Adam(system.vae.parameters(), 1e-2)
        for i in range(150):
            loss = system.loss(random_batch(system, 64, i), g(i))
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
        found.append(loss.scalars["elbo/kl"].item())
    assert found[0] > 2 * found[1]


def test_convolutions_fit_their_resolution() -> None:
    for preset, channels in (("beta-celeba64", 3), ("beta-dsprites64", 1), ("capacity-dsprites64", 1)):
        with torch.device("meta"):
            system = build("vae", preset)
            assert isinstance(system, VAE)
            assert system.vae.posterior(torch.zeros(2, channels, 64, 64)).mu.shape == (2, system.config.latent_dim)
            assert system.vae(torch.zeros(2, system.config.latent_dim)).shape == (2, channels, 64, 64)


def test_sizes_of_the_papers_convolutions() -> None:
    """By arithmetic: 4×4 convolutions of stride 2 down to 4×4 pixels, then dense layers, and the same backwards."""

    def conv(i: int, o: int) -> int:
        return 16 * i * o + o

    def linear(i: int, o: int) -> int:
        return i * o + o

    def faces(channels: int, z: int) -> int:
        down = conv(channels, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64)
        up = conv(64, 64) + conv(64, 32) + conv(32, 32) + conv(32, channels)
        return down + linear(1024, 256) + linear(256, 2 * z) + linear(z, 256) + linear(256, 1024) + up

    down, up = conv(1, 32) + 3 * conv(32, 32), 3 * conv(32, 32) + conv(32, 1)
    dense = (
        linear(512, 256) + linear(256, 256) + linear(256, 20) + linear(10, 256) + linear(256, 256) + linear(256, 512)
    )
    sizes = {
        "beta-celeba64": faces(3, 32) + 1,  # and one width of all pixels
        "beta-dsprites64": faces(1, 10),
        "capacity-dsprites64": down + dense + up,
    }
    for preset, size in sizes.items():
        with torch.device("meta"):
            system = build("vae", preset)
        assert sum(p.numel() for p in system.networks()["vae"].parameters()) == size, preset


def test_dequantised_pixels_fill_their_cells() -> None:
    levels = torch.arange(256).float().view(1, 1, 16, 16) / 127.5 - 1
    for bits in (8, 5):
        x = dequantise(levels, bits, g())
        assert -1 <= x.min() < x.max() < 1
        torch.testing.assert_close(undo_dequantise(x, bits), quantise(levels, bits))
    # A uniform density over [-1, 1) says 8 bits for each pixel.
    assert -(256 * math.log(0.5) + log_volume(256, 8)) / (256 * math.log(2)) == 8
