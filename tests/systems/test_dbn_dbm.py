"""Deep belief networks and deep Boltzmann machines against enumeration of all their states."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.systems.tiny import random_batch
from torch import Tensor

from bessemer.spec.job import OptimizerSpec
from bessemer.systems.contract import Batch, Clock
from bessemer.systems.energy.dbn import DBN
from bessemer.systems.energy.deep_boltzmann import DBM
from bessemer.systems.energy.rbm import as_bits
from bessemer.systems.registry import build
from bessemer.training.optimizers import build_optimizer


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(units: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)))


def dbn(**fields: Any) -> DBN:
    few = {"resolution": 2, "hidden": (3, 4), "layer_kimg": (1.0, 1.0), "binarise": "threshold"}
    system = build("dbn", "tiny8", {**few, **fields})
    assert isinstance(system, DBN)
    system.init_weights(g())
    for i, (_, network) in enumerate(system.networks().items()):
        for j, p in enumerate(network.parameters()):
            p.data = torch.randn(p.shape, generator=g(10 * i + j))
    return system


def dbm(**fields: Any) -> DBM:
    few = {"resolution": 2, "hidden": (3, 2), "binarise": "threshold", "chains": 8, "weight_decay": 0.0}
    system = build("dbm", "tiny8", {**few, **fields})
    assert isinstance(system, DBM)
    system.init_weights(g())
    for j, p in enumerate(system.dbm.parameters()):
        p.data = torch.randn(p.shape, generator=g(j))
    return system


def images(v: Tensor) -> Batch:
    return Batch((2 * v - 1).view(-1, 1, 2, 2), torch.zeros(len(v), dtype=torch.int64))


# DBN


def exact(system: DBN) -> Tensor:
    """Log p(v) of all images: Σ over h1 of p(v | h1) p(h1), p(h1) the marginal of the upper RBM."""
    lower, upper = system.layers
    h1 = states(len(lower.b))
    log_p_h1 = torch.log_softmax(-upper.free_energy(h1), 0)
    p = torch.sigmoid(lower.a + h1 @ lower.W.T)
    v = states(4)
    log_p_v = v @ p.log().T + (1 - v) @ (1 - p).log().T
    return torch.logsumexp(log_p_v + log_p_h1, 1)


def test_layers_are_trained_one_after_the_other() -> None:
    system = dbn()
    assert [s.name for s in system.stages()] == ["rbm1", "rbm2"]
    assert [system.updates(Clock(n, 0))[0].network for n in (0, 999, 1000, 99_000)] == ["rbm1", "rbm1", "rbm2", "rbm2"]
    assert system.depth == 1
    system.after_iteration(Clock(1000, 5))
    assert system.depth == 1, "the second stage begins now: its layer is not trained yet"
    system.after_iteration(Clock(1008, 6))
    assert system.depth == 2


@torch.no_grad()
def test_a_second_layer_that_is_the_first_upside_down_changes_nothing() -> None:
    """Then the upper RBM's marginal of h1 is the lower one's, and so is p(v)."""
    system = dbn(hidden=(3, 4))
    lower, upper = system.layers
    upper.W.data, upper.a.data, upper.b.data = lower.W.T.clone(), lower.b.clone(), lower.a.clone()
    v = states(4)
    alone = -lower.free_energy(v) - torch.logsumexp(-lower.free_energy(v), 0)
    torch.testing.assert_close(exact(system), alone)


@torch.no_grad()
def test_bounds_of_the_dbns_likelihood() -> None:
    system = dbn()
    v = states(4)
    one = system.log_likelihood(images(v), g())
    lower = system.layers[0]
    torch.testing.assert_close(one.float(), torch.log_softmax(-lower.free_energy(v), 0))
    for layer in system.layers:
        layer.begun.fill_(1)
    truth = exact(system)
    single = torch.stack([system.log_likelihood(images(v), g(i)) for i in range(200)])
    many = system.log_likelihood(images(v), g(), 3000)
    assert (single.mean(0) < truth + 0.02).all()
    torch.testing.assert_close(many.float(), truth, rtol=0, atol=0.1)
    assert torch.logsumexp(truth, 0).abs() < 1e-5


@torch.no_grad()
def test_samples_of_the_dbn_have_its_distribution() -> None:
    system = dbn(sampling_steps=40)
    for layer in system.layers:
        layer.begun.fill_(1)
    p = system.sample(torch.zeros(20_000, dtype=torch.int64), g()).flatten(1).add(1).div(2)
    torch.testing.assert_close(p.mean(0), exact(system).exp() @ states(4), rtol=0, atol=0.02)


def test_each_layers_gradient_is_contrastive_divergence_of_the_bits_below() -> None:
    system, batch = dbn(gibbs_steps=1, weight_decay=0.1), random_batch(dbn(), 8)
    lower, rbm = system.layers
    system.updates(Clock(5000, 0))[0].loss(batch, g(3)).value.backward()
    draws = g(3)
    v = as_bits(batch.images, "threshold", g())
    h0 = (torch.rand(8, 3, generator=draws) < torch.sigmoid(v @ lower.W + lower.b)).float()
    up = (torch.rand(8, 4, generator=draws) < torch.sigmoid(h0 @ rbm.W + rbm.b)).float()
    hk = (torch.rand(8, 3, generator=draws) < torch.sigmoid(rbm.a + up @ rbm.W.T)).float()
    p0, pk = torch.sigmoid(h0 @ rbm.W + rbm.b), torch.sigmoid(hk @ rbm.W + rbm.b)
    torch.testing.assert_close(rbm.W.grad, (hk.T @ pk - h0.T @ p0) / 8 + 0.1 * rbm.W)
    torch.testing.assert_close(rbm.a.grad, (hk - h0).mean(0))
    torch.testing.assert_close(rbm.b.grad, (pk - p0).mean(0))
    assert lower.W.grad is None


# DBM


@torch.no_grad()
def joint(system: DBM) -> Tensor:
    """-E of all states, [2^V, 2^H1, 2^H2], from the definition."""
    d, (v, h1, h2) = system.dbm, (states(n) for n in (4, 3, 2))
    out = (v @ d.a)[:, None, None] + (h1 @ (d.b1 + d.c1))[None, :, None] + (h2 @ d.b2)[None, None]
    return out + (v @ d.W1 @ h1.T)[:, :, None] + (h1 @ d.W2 @ h2.T)[None]


@torch.no_grad()
def test_the_bound_rises_with_every_step_and_stays_below_the_likelihood() -> None:
    system, v = dbm(), states(4)
    log_z = torch.logsumexp(joint(system).flatten(), 0)
    torch.testing.assert_close(system.log_z().float(), log_z)
    truth = torch.logsumexp(joint(system).flatten(1), 1) - log_z
    bounds = torch.stack([system.bound(v, steps) for steps in range(1, 12)])
    assert (bounds[1:] >= bounds[:-1] - 1e-6).all()
    assert bounds[-1].sum() > bounds[0].sum()
    assert (bounds[-1] <= truth + 1e-6).all()
    assert (truth - bounds[-1]).mean() < 0.3


def test_the_gradient_is_that_of_the_bound() -> None:
    """Positive phase from the mean field; the chains' phase, with all states in their proportions, is ∇ log Z."""
    system = dbm(chains=8, weight_decay=0.1)
    batch = random_batch(system, 16)
    loss = system.loss(batch, g()).value
    loss.backward()
    found = [p.grad.clone() for p in system.dbm.parameters() if p.grad is not None]
    v = as_bits(batch.images, "threshold", g())
    chains = system.dbm.chains.sum_values
    mu1, mu2 = system.dbm.mean_field(v, 10)
    p1 = torch.sigmoid(system.dbm.bias1 + chains[:, :4] @ system.dbm.W1 + chains[:, 4:] @ system.dbm.W2.T)
    expected = [
        -(v.T @ mu1 / 16 - chains[:, :4].T @ p1 / 8) + 0.1 * system.dbm.W1,
        -(mu1.T @ mu2 / 16 - p1.T @ chains[:, 4:] / 8) + 0.1 * system.dbm.W2,
        -(v.mean(0) - chains[:, :4].mean(0)),
        -(mu1.mean(0) - p1.mean(0)),
        -(mu2.mean(0) - chains[:, 4:].mean(0)),
        torch.zeros(3),  # c1 rests
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach())


@torch.no_grad()
def test_samples_of_the_dbm_have_its_distribution() -> None:
    system = dbm(sampling_steps=40)
    system.dbm.W1 *= 4
    p = torch.softmax(torch.logsumexp(joint(system).flatten(1), 1), 0)
    drawn = system.sample(torch.zeros(20_000, dtype=torch.int64), g()).flatten(1).add(1).div(2)
    torch.testing.assert_close(drawn.mean(0), p @ states(4), rtol=0, atol=0.02)


def test_pretraining_doubles_what_a_layer_will_miss() -> None:
    """Both steps of contrastive divergence by hand: h1 sees the pixels, or h2, and its bias twice; they see it once."""
    system = dbm(gibbs_steps=1)
    d, batch = system.dbm, random_batch(system, 8)

    def bits(logits: Tensor) -> Tensor:
        return (torch.rand(logits.shape, generator=draws) < torch.sigmoid(logits)).float()

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)

    v = as_bits(batch.images, "threshold", g())
    with torch.no_grad():
        draws = g(3)
        h = bits(2 * (v @ d.W1 + d.b1))
        copies = bits(twice(d.a + h @ d.W1.T)).split(4, 1)
        seen = torch.stack(copies).mean(0)
        h0, hk = torch.sigmoid(2 * (v @ d.W1 + d.b1)), torch.sigmoid(2 * (seen @ d.W1 + d.b1))
        first = {"W1": seen.T @ hk - v.T @ h0, "a": (seen - v).sum(0), "b1": (hk - h0).sum(0)}
        draws = g(3)
        h0 = bits(2 * (v @ d.W1 + d.b1))
        h2 = bits(twice(h0 @ d.W2 + d.b2)).split(2, 1)
        hk = bits(2 * (torch.stack(h2).mean(0) @ d.W2.T + d.c1))
        p0, pk = torch.sigmoid(h0 @ d.W2 + d.b2), torch.sigmoid(hk @ d.W2 + d.b2)
        second = {"W2": hk.T @ pk - h0.T @ p0, "c1": (hk - h0).sum(0), "b2": (pk - p0).sum(0)}
    for loss, expected in ((system.first_loss, first), (system.second_loss, second)):
        loss(batch, g(3)).value.backward()
        for name, p in d.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(p.grad, expected.get(name, 0 * p.detach()) / 8)
        d.zero_grad()


@torch.no_grad()
def test_together_h1_sees_the_mean_of_what_it_saw_apart() -> None:
    d, v, h2 = dbm().dbm, states(4)[:4], states(2)
    apart = [d.lower().hidden_given(torch.cat([v, v], 1)), d.upper().visible_given(torch.cat([h2, h2], 1))]
    together = d.view().hidden_given(torch.cat([v, h2], 1))
    torch.testing.assert_close(torch.logit(together), torch.stack([torch.logit(p) for p in apart]).mean(0))


def test_layers_that_are_not_trained_rest() -> None:
    """Neither the penalty nor momentum moves them, with the optimizer that forgets as each stage begins."""
    system = dbm(weight_decay=0.1)
    assert [stage.renews for stage in system.stages()] == [(), ("dbm",), ("dbm",)]
    rule, resting = system.optimizers()["dbm"], ({"W2", "c1", "b2"}, {"W1", "a", "b1"}, {"c1"})
    for start, rests in zip(system.stage_starts(), resting, strict=True):
        before = {k: p.detach().clone() for k, p in system.dbm.named_parameters()}
        optimizer = build_optimizer("dbm", system.dbm, rule, OptimizerSpec())
        for i in range(3):
            optimizer.zero_grad()
            system.updates(start)[0].loss(random_batch(system, 8, i), g(i)).value.backward()
            optimizer.step()
        assert {k for k, p in system.dbm.named_parameters() if torch.equal(p, before[k])} == rests


@pytest.mark.parametrize("name", ["dbm"])
def test_chains_must_divide_into_slices(name: str) -> None:
    system = build(name, "tiny8")
    assert "64 chains" in str(system.refusal(3))
    assert system.refusal(2) is None
