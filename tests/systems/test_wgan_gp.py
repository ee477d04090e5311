"""WGAN-GP: the penalty where it is known, sizes of the networks, losses by hand."""

from __future__ import annotations

import pytest
import torch
from tests.systems.tiny import random_batch, tiny_system
from torch import nn

from bessemer.nn.penalties import gradient_penalty
from bessemer.systems.adversarial.wgan_gp import WGANGP
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build
from bessemer.training.rng import generator


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sizes_of_the_networks() -> None:
    """Those of torch-mimicry's WGAN-GP at 32 pixels, whose generator is twice as wide as the paper's."""
    with torch.device("meta"):
        system = build("wgan-gp", "cifar10", {"generator_width": 256})
    sizes = {k: sum(p.numel() for p in n.parameters()) for k, n in system.networks().items()}
    assert sizes == {"generator": 4_276_739, "critic": 1_053_825}


def test_hyper_parameters_are_the_papers() -> None:
    with torch.device("meta"):
        system = build("wgan-gp", "cifar10")
    assert isinstance(system, WGANGP)
    adam = system.optimizers()["critic"]
    assert (adam.name, adam.lr, adam.betas, system.config.penalty) == ("adam", 2e-4, (0.0, 0.9), 10.0)
    critic, _ = system.updates(Clock(0, 0))
    assert (critic.repeats, critic.second_order) == (5, True)


@pytest.mark.parametrize(("norm", "expected"), [(1.0, 0.0), (0.0, 1.0), (3.0, 4.0)])
def test_a_linear_critic_pays_for_its_norm(norm: float, expected: float) -> None:
    direction = torch.randn(48, generator=g())
    w = norm * direction / direction.norm()
    x = torch.randn(6, 3, 4, 4, generator=g(1))
    assert gradient_penalty(lambda x: x.flatten(1) @ w, x).item() == pytest.approx(expected, abs=1e-5)


def test_the_penaltys_gradient_against_finite_differences() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    for p in net.parameters():
        p.data.normal_(generator=g(p.numel()))
    x = torch.randn(4, 5, generator=g(), dtype=torch.float64)

    def penalty() -> torch.Tensor:
        return gradient_penalty(lambda x: net(x)[:, 0], x)

    weight = net[0].weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction, step, values = torch.randn(7, 5, generator=g(3), dtype=torch.float64), 1e-6, []
    for sign in (1, -1):
        weight.data.add_(direction, alpha=sign * step)
        values.append(penalty().item())
        weight.data.add_(direction, alpha=-sign * step)
    # The norms are taken in float32.
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05)


def test_critics_loss_by_hand() -> None:
    system = tiny_system("wgan-gp")
    assert isinstance(system, WGANGP)
    batch, draws = random_batch(system), generator("cpu", 5)
    fakes = system.generator(torch.randn(4, system.config.latent_dim, generator=draws))
    between = torch.stack(
        [e * x + (1 - e) * f for e, x, f in zip(torch.rand(4, generator=draws), batch.images, fakes, strict=True)]
    )
    norms = [torch.autograd.functional.jacobian(lambda x: system.critic(x[None])[0], x).norm() for x in between]
    expected = system.critic(fakes).mean() - system.critic(batch.images).mean()
    expected = expected + 10 * sum((n - 1) ** 2 for n in norms) / 4
    torch.testing.assert_close(system.critic_loss(batch, generator("cpu", 5)).value, expected)


def test_generators_loss_raises_the_critics_scores() -> None:
    system = tiny_system("wgan-gp")
    assert isinstance(system, WGANGP)
    z = torch.randn(4, system.config.latent_dim, generator=g(6))
    expected = -system.critic(system.generator(z)).sum() / 4
    torch.testing.assert_close(system.generator_loss(random_batch(system), g(6)).value, expected)
