"""VQ-VAE: the codebook by brute force and on any number of workers, straight-through gradients, stages, sizes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tests.systems.tiny import random_batch

from bessemer.nn.codebook import Codebook
from bessemer.nn.update_state import begin_update, end_update
from bessemer.systems.autoencoding.vqvae import VQVAE
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def book(codes: int = 7, dim: int = 3, **fields: Any) -> Codebook:
    found = Codebook(codes, dim, **fields)
    found.init_weights(g())
    return found


def small(**fields: Any) -> VQVAE:
    few = {"width": 8, "residual_width": 4, "codes": 16, "code_dim": 4, "prior_width": 4}
    system = build("vqvae", "tiny32", {**few, **fields})
    assert isinstance(system, VQVAE)
    system.init_weights(g())
    system.init_from_data(random_batch(system, 8), g())
    return system


def test_each_vector_gets_its_nearest_code() -> None:
    layer = book()
    z = torch.randn(2, 3, 4, 5, generator=g(1))
    e, index, commitment = layer(z)
    flat = z.movedim(1, -1).reshape(-1, 3)
    expected = torch.stack([(layer.codes - v).norm(dim=1).argmin() for v in flat])
    assert torch.equal(index.flatten(), expected)
    torch.testing.assert_close(e.movedim(1, -1).reshape(-1, 3), layer.codes[expected])
    torch.testing.assert_close(commitment, (flat - layer.codes[expected]).square().mean())


def test_the_decoders_gradient_passes_straight_through() -> None:
    layer, z = book(), torch.randn(2, 3, 4, 4, generator=g(1)).requires_grad_()
    weight = torch.randn(2, 3, 4, 4, generator=g(2))
    e, _, _ = layer(z)
    (gradient,) = torch.autograd.grad((e * weight).sum(), z)
    assert torch.equal(gradient, weight)


def test_commitment_draws_vectors_to_their_codes() -> None:
    layer, z = book(), torch.randn(2, 3, 4, 4, generator=g(1)).requires_grad_()
    e, _, commitment = layer(z)
    (gradient,) = torch.autograd.grad(commitment, z)
    torch.testing.assert_close(gradient, 2 * (z - e).detach() / z.numel())


def test_counts_are_smoothed_and_keep_their_sum() -> None:
    layer = book(decay=0.9, eps=0.5)
    z, start = torch.randn(4, 3, 2, 2, generator=g(1)), layer.codes.clone()
    begin_update([layer])
    layer.observe(z, layer.nearest(z))
    end_update([layer])
    chose = torch.nn.functional.one_hot(torch.cdist(z.movedim(1, -1).reshape(-1, 3), start).argmin(1), 7).float()
    counts, sums = 0.9 + 0.1 * chose.sum(0), 0.9 * start + 0.1 * chose.T @ z.movedim(1, -1).reshape(-1, 3)
    smoothed = (counts + 0.5) / (counts.sum() + 7 * 0.5) * counts.sum()
    torch.testing.assert_close(layer.codes, sums / smoothed[:, None])


def test_codes_are_moving_averages_of_all_workers_vectors() -> None:
    alone = book(decay=0.9)
    pair = [copy.deepcopy(alone), copy.deepcopy(alone)]
    start = alone.codes.clone()
    z = [torch.randn(1, 3, 2, 2, generator=g(i)) for i in range(4)]
    begin_update([alone, *pair])
    for i, part in enumerate(z):
        for layer in (alone, pair[i % 2]):
            layer.observe(part, layer.nearest(part))
    assert torch.equal(alone.codes, start), "nothing moves before the update ends"
    shares = [torch.cat([t.reshape(-1).clone() for t in layer.pending()]) for layer in pair]
    end_update([alone])
    for layer in pair:
        end_update([layer], all_reduce=lambda flat: flat.copy_(shares[0] + shares[1]))
        torch.testing.assert_close(layer.codes, alone.codes)
    flat = torch.cat(z).movedim(1, -1).reshape(-1, 3)
    nearest = torch.cdist(flat, start).argmin(1)
    for i in range(7):
        count, total = 0.9 + 0.1 * (nearest == i).sum(), 0.9 * start[i] + 0.1 * flat[nearest == i].sum(0)
        torch.testing.assert_close(alone.codes[i], total / count, rtol=1e-3, atol=1e-4)
    before = alone.codes.clone()
    begin_update([alone])
    end_update([alone])
    assert torch.equal(alone.codes, before), "an update that quantises nothing leaves the codes alone"


def test_size_of_vq_vae_2() -> None:
    """That of the best known port to PyTorch, whose residual blocks are half as wide as the paper's."""
    with torch.device("meta"):
        network = build("vqvae", "imagenet256-2", {"residual_width": 32}).networks()["vqvae"]
    assert sum(p.numel() for p in network.parameters()) == 1_388_867


@pytest.mark.parametrize("levels", [1, 2])
def test_shapes_and_stages(levels: int) -> None:
    system = small(levels=levels, classes=3)
    batch = random_batch(system, 2)
    quantised, indices, _ = system.vqvae.encode(batch.images)
    assert [i.shape[1] for i in indices] == [[8], [4, 8]][levels - 1]
    torch.testing.assert_close(system.vqvae.look_up(indices)[-1], quantised[-1])
    assert system.vqvae.decode(quantised).shape == batch.images.shape
    torch.testing.assert_close(
        system.vqvae.decode(system.vqvae.look_up(indices)), system.vqvae.decode(quantised), rtol=1e-4, atol=1e-4
    )
    assert [u.name for u in system.updates(Clock(0, 0))] == ["reconstruction"]
    later = [u.name for u in system.updates(Clock(20_000, 0))]
    assert later == [["prior"], ["prior_top", "prior_bottom"]][levels - 1]


@pytest.mark.parametrize("levels", [1, 2])
def test_loss_by_hand(levels: int) -> None:
    """Squared errors of pixels, and of every level's vectors against their codes; both maps reach the image."""
    system, z = small(levels=levels, commitment=0.3), list[torch.Tensor]()
    for layer in system.vqvae.codebooks:
        layer.register_forward_hook(lambda m, args, out: z.append(args[0]))
    batch = random_batch(system)
    loss = system.loss(batch, g())
    codes = [layer.look_up(layer.nearest(v)) for layer, v in zip(system.vqvae.codebooks, z, strict=True)]  # type: ignore[operator]
    image = system.vqvae.decode(codes)
    expected = (image - batch.images).square().mean() + 0.3 * sum(
        (v - e).square().mean() for v, e in zip(z, codes, strict=True)
    )
    torch.testing.assert_close(loss.value, expected)
    for level in range(levels):
        other = [e + 1.0 if i == level else e for i, e in enumerate(codes)]
        assert not torch.allclose(system.vqvae.decode(other), image)


def test_the_bottom_sees_the_codes_of_the_top() -> None:
    system, z = small(levels=2), list[torch.Tensor]()
    top, bottom = system.vqvae.codebooks
    bottom.register_forward_hook(lambda m, args, out: z.append(args[0]))
    for move in (0.0, 1.0):
        top.codes += move  # type: ignore[operator]
        system.vqvae.encode(random_batch(system).images)
    assert not torch.allclose(z[0], z[1])


def test_loss_of_the_priors_by_hand() -> None:
    system = small(levels=2, classes=3, prior_dropout=0.0)
    batch = random_batch(system)
    _, indices, _ = system.vqvae.encode(batch.images)
    for level, prior in enumerate(system.priors):
        logits = prior(indices[level], batch.labels, indices[0] if level else None, None)
        p = torch.softmax(logits, 1).gather(1, indices[level][:, None])
        torch.testing.assert_close(system.prior_loss(batch, g(), level).value, -p.log2().mean())
        other = prior(indices[level], (batch.labels + 1) % 3, indices[0] if level else None, None)
        assert not torch.allclose(other, logits)


@torch.no_grad()
def test_codes_are_drawn_from_the_priors_and_decoded() -> None:
    """The same draws from the distributions that the whole networks give, by the inverse of what Gumbel noise does."""
    system = small(levels=2, classes=3)
    labels, draws, indices = torch.tensor([2, 0]), g(6), list[torch.Tensor]()
    for level, prior in enumerate(system.priors):
        side = 4 << level
        index = torch.zeros(2, side, side, dtype=torch.int64)
        for row, column in itertools.product(range(side), repeat=2):
            logits = prior(index, labels, indices[0] if level else None, None)[:, :, row, column]
            u = torch.rand(logits.shape, generator=draws, dtype=torch.float64)
            index[:, row, column] = (torch.softmax(logits, 1) / -u.log()).argmax(1)  # exponential races
        indices.append(index)
    expected = system.vqvae.decode(system.vqvae.look_up(indices)).clamp(-1, 1)
    torch.testing.assert_close(system.sample(labels, g(6)), expected, rtol=1e-4, atol=1e-4)


def test_the_first_codes_are_vectors_of_the_encoder() -> None:
    system = small()
    z: list[torch.Tensor] = []
    system.vqvae.codebooks[0].register_forward_hook(lambda m, args, out: z.append(args[0]))
    _, (index,), commitment = system.vqvae.encode(random_batch(system, 8).images)
    assert commitment < 0.7 * z[0].var()
    assert len(index.unique()) > 8


def test_the_prior_knows_what_came_before_and_what_is_above() -> None:
    system = small(levels=2)
    prior, draws = system.priors[1], g(5)
    index, above = torch.randint(16, (1, 8, 8), generator=draws), torch.randint(16, (1, 4, 4), generator=draws)
    labels = torch.zeros(1, dtype=torch.int64)
    base = prior(index, labels, above, None)
    changed = index.clone()
    changed[0, 3, 4] = (changed[0, 3, 4] + 1) % 16
    differs = (prior(changed, labels, above, None) - base).abs().amax((0, 1)) > 0
    assert not differs.flatten()[: 3 * 8 + 5].any()
    assert differs[3, 5]
    assert differs[4, 4]
    other = (above + 1) % 16
    assert ((prior(index, labels, other, None) - base).abs().amax((0, 1)) > 0).all()


def test_codebooks_move_with_the_auto_encoder_and_stand_still_with_the_prior() -> None:
    system = small()
    networks = list(system.networks().values())
    for loss, moves in ((system.loss, True), (lambda b, g: system.prior_loss(b, g, 0), False)):
        before = system.vqvae.codebooks[0].codes.clone()
        begin_update(networks)
        loss(random_batch(system), g())
        end_update(networks)
        assert torch.equal(system.vqvae.codebooks[0].codes, before) != moves
