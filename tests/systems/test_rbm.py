"""The RBM against enumeration of all its states."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.systems.tiny import random_batch
from torch import Tensor

from bessemer.nn.update_state import begin_update, end_update
from bessemer.spec.job import OptimizerSpec
from bessemer.systems.contract import Batch
from bessemer.systems.energy.rbm import RBM, RBMNetwork, as_bits, log_partition
from bessemer.systems.registry import build
from bessemer.training.optimizers import build_optimizer


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def machine(visible: int = 6, hidden: int = 4, scale: float = 1.0) -> RBMNetwork:
    rbm = RBMNetwork(visible, hidden).double()
    for i, p in enumerate(rbm.parameters()):
        p.data = scale * torch.randn(p.shape, generator=g(i), dtype=torch.float64)
    return rbm


def states(units: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=torch.float64)


def joint(rbm: RBMNetwork) -> Tensor:
    """-E(v, h) of all states, [2^V, 2^H], from the definition."""
    v, h = states(len(rbm.a)), states(len(rbm.b))
    return (v @ rbm.a)[:, None] + (h @ rbm.b)[None] + v @ rbm.W @ h.T


def small(**fields: Any) -> RBM:
    system = build("rbm", "tiny8", {"resolution": 3, "hidden": 4, **fields})
    assert isinstance(system, RBM)
    system.init_weights(g(1))
    for p in system.rbm.parameters():
        p.data = torch.randn(p.shape, generator=g(p.numel()))
    return system


def test_free_energy_sums_the_hidden_units_out() -> None:
    rbm = machine()
    torch.testing.assert_close(-rbm.free_energy(states(6)), torch.logsumexp(joint(rbm), 1))


def test_conditionals_are_those_of_the_joint() -> None:
    rbm = machine()
    p = torch.softmax(joint(rbm).flatten(), 0).view(64, 16)
    torch.testing.assert_close(rbm.hidden_given(states(6)), p @ states(4) / p.sum(1, keepdim=True))
    torch.testing.assert_close(rbm.visible_given(states(4)), p.T @ states(6) / p.sum(0)[:, None])


def test_log_z_exact_and_by_annealing() -> None:
    rbm = machine()
    torch.testing.assert_close(log_partition(rbm, 1, 1, g()), torch.logsumexp(joint(rbm).flatten(), 0))
    wide = machine(10, 14, 0.5)  # too many hidden units to enumerate; the visible ones are not
    exact = torch.logsumexp(-wide.free_energy(states(10)), 0)
    estimates = [log_partition(wide, 300, 200, g(i)) for i in range(3)]
    assert all(abs(e - exact) < 0.1 for e in estimates)
    crude = log_partition(wide, 1, 200, g())
    assert abs(crude - exact) > abs(estimates[0] - exact)


def test_the_annealed_estimate_of_z_is_without_bias() -> None:
    """With three temperatures, where each weight and each step counts: the mean over many chains is still Z."""
    rbm = machine(8, 13, 0.6)
    exact = torch.logsumexp(-rbm.free_energy(states(8)), 0)
    estimates = [log_partition(rbm, 3, 50_000, g(i)) for i in range(4)]
    assert torch.logsumexp(torch.stack(estimates), 0) - math.log(4) == pytest.approx(exact.item(), abs=0.02)


def test_likelihoods_of_all_images_sum_to_one() -> None:
    system = small(binarise="threshold")
    images = (2 * states(9) - 1).view(-1, 1, 3, 3).float()
    found = system.log_likelihood(Batch(images, torch.zeros(512, dtype=torch.int64)), g())
    assert torch.logsumexp(found, 0).item() == pytest.approx(0, abs=1e-5)
    before = system.log_z()
    assert system.log_z() is before
    with torch.no_grad():
        system.rbm.b += 1
    assert system.log_z() > before, "other weights, another Z"


def test_the_surrogates_gradient_is_contrastive_divergence() -> None:
    """⟨v hᵀ⟩ of the data minus that of the reconstructions, which the same draws give."""
    system, batch = small(chains=0, gibbs_steps=2, weight_decay=0.0), None
    batch = random_batch(system, 64)
    system.loss(batch, g(5)).value.backward()
    draws, rbm = g(5), system.rbm
    v0 = as_bits(batch.images, "random", draws)
    vk = v0
    for _ in range(2):
        h = (torch.rand(64, 4, generator=draws) < torch.sigmoid(vk @ rbm.W + rbm.b)).float()
        vk = (torch.rand(64, 9, generator=draws) < torch.sigmoid(rbm.a + h @ rbm.W.T)).float()
    h0, hk = torch.sigmoid(v0 @ rbm.W + rbm.b), torch.sigmoid(vk @ rbm.W + rbm.b)
    torch.testing.assert_close(rbm.W.grad, -(v0.T @ h0 - vk.T @ hk) / 64)
    torch.testing.assert_close(rbm.a.grad, -(v0 - vk).mean(0))
    torch.testing.assert_close(rbm.b.grad, -(h0 - hk).mean(0))


def test_the_penalty_pulls_at_weights_alone() -> None:
    steps = []
    for decay in (0.0, 0.5):
        system = small(chains=0, weight_decay=decay)
        start = system.rbm.W.detach().clone()
        optimizer = build_optimizer("rbm", system.rbm, system.optimizers()["rbm"], OptimizerSpec())
        system.loss(random_batch(system, 16), g(5)).value.backward()
        optimizer.step()
        steps.append((system.rbm.W.detach(), system.rbm.a.detach(), system.rbm.b.detach()))
    for bias, same in zip(steps[0][1:], steps[1][1:], strict=True):
        assert torch.equal(bias, same)
    torch.testing.assert_close(steps[1][0], steps[0][0] - system.config.lr * 0.5 * start)


def test_more_gibbs_steps_come_nearer_to_the_likelihoods_gradient() -> None:
    errors = []
    for steps in (1, 20):
        system = small(chains=0, gibbs_steps=steps, binarise="threshold")
        batch = random_batch(system, 20_000)
        system.loss(batch, g()).value.backward()
        found = system.rbm.W.grad
        system.rbm.zero_grad()
        v = as_bits(batch.images, "threshold", g())
        exact = torch.logsumexp(-system.rbm.free_energy(states(9).float()), 0)
        (system.rbm.free_energy(v).mean() + exact).backward()
        assert system.rbm.W.grad is not None
        assert found is not None
        errors.append((found - system.rbm.W.grad).norm().item())
    assert errors[1] < 0.5 * errors[0]


def test_persistent_chains_go_on_and_belong_to_slices() -> None:
    system = small(chains=8, gibbs_steps=1)
    assert system.rbm.chains is not None
    start = system.rbm.chains.values.clone()
    assert set(start.unique().tolist()) == {0.0, 1.0}
    begin_update([system.rbm])
    for index in (1, 0):  # whatever the order
        system.loss(random_batch(system, 4, slice=index, slices=2), g(index))
    assert torch.equal(system.rbm.chains.values, start), "all slices read the chains of before the update"
    end_update([system.rbm])
    for index in (0, 1):
        draws, rows = g(index), slice(4 * index, 4 * index + 4)
        as_bits(random_batch(system, 4).images, "random", draws)
        expected = system.rbm.gibbs(start[rows], 1, draws)
        assert torch.equal(system.rbm.chains.values[rows], expected)
    assert system.refusal(3) == "8 chains (system.config.chains) are no multiple of 3"
    assert system.refusal(4) is None


def test_chains_reach_the_machines_distribution() -> None:
    rbm = machine(4, 3)
    v = rbm.gibbs(torch.zeros(20_000, 4, dtype=torch.float64), 30, g(2))
    counts = torch.bincount((v @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)).long(), minlength=16)
    p = torch.softmax(-rbm.free_energy(states(4)), 0)
    assert 0.5 * (counts / 20_000 - p).abs().sum() < 0.02


def test_visible_biases_begin_at_the_log_odds_of_the_pixels() -> None:
    system = small(binarise="threshold")
    images = -torch.ones(6, 1, 3, 3)
    images[:2, 0, 0, 0] = 1
    system.init_from_data(Batch(images, torch.zeros(6, dtype=torch.int64)), g())
    assert system.rbm.a[0].item() == pytest.approx(math.log((3 / 8) / (5 / 8)), abs=1e-5)
    assert system.rbm.a[1].item() == pytest.approx(math.log((1 / 8) / (7 / 8)), abs=1e-5)
