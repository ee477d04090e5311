"""CycleGAN: sizes of the networks, the pool of generated images, and the losses written out."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.systems.tiny import random_batch, tiny_system
from torch import Tensor, nn

from bessemer.nn.image_pool import ImagePool
from bessemer.nn.update_state import begin_update, end_update
from bessemer.systems.contract import Batch
from bessemer.systems.registry import build
from bessemer.systems.translation.cyclegan import CycleGAN, CycleGANConfig


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: object) -> CycleGAN:
    system = tiny_system("cyclegan", **fields)
    assert isinstance(system, CycleGAN)
    return system


@pytest.mark.parametrize(("preset", "generator"), [("unpaired256", 11_378_179), ("unpaired128", 7_837_699)])
def test_parameter_counts(preset: str, generator: int) -> None:
    """11.378 and 2.765 millions are what the authors' PyTorch code prints of nine blocks and of a discriminator."""
    with torch.device("meta"):
        system = build("cyclegan", preset)
    assert isinstance(system, CycleGAN)
    count = [sum(p.numel() for p in n.parameters()) for n in (*system.generator.children(), *_judges(system))]
    assert count == [generator, generator, 2_764_737, 2_764_737]
    scores = system.discriminator.x(torch.empty(1, 3, 256, 256, device="meta"))
    assert scores.shape == (1, 1, 30, 30)


def _judges(system: CycleGAN) -> list[nn.Module]:
    return [system.discriminator.x, system.discriminator.y]


def asked(pool: ImagePool, images: Tensor, index: int, slices: int, draws: torch.Generator) -> Tensor:
    """One query in an update of its own."""
    begin_update([pool])
    shown = pool.query(images, index, slices, draws)
    end_update([pool])
    return shown


class PlainPool:
    """The rule in words: fill up; then half of the time swap with a random old one."""

    def __init__(self, size: int) -> None:
        self.size, self.kept = size, list[float]()

    def query(self, images: list[float], coins: list[float], picks: list[int]) -> list[float]:
        shown = []
        for image, coin, pick in zip(images, coins, picks, strict=True):
            if len(self.kept) < self.size:
                self.kept.append(image)
                shown.append(image)
            elif coin < 0.5:
                shown.append(self.kept[pick])
                self.kept[pick] = image
            else:
                shown.append(image)
        return shown


def test_the_pool_follows_its_rule_in_each_slice_by_itself() -> None:
    pool, plain = ImagePool(10, (1, 2, 2)), [PlainPool(5), PlainPool(5)]
    for step in range(40):
        begin_update([pool])
        for index in range(2):
            numbers = [100.0 * step + 10 * index + i for i in range(3)]
            images = torch.tensor(numbers).view(3, 1, 1, 1).expand(-1, -1, 2, 2)
            shown = pool.query(images, index, 2, g(2 * step + index))
            draws = g(2 * step + index)
            coins, picks = torch.rand(3, generator=draws), torch.randint(5, (3, 1), generator=draws)
            expected = plain[index].query(numbers, coins.tolist(), picks.flatten().tolist())
            assert shown[:, 0, 0, 0].tolist() == expected
        end_update([pool])
        kept = pool.images.values[:, 0, 1, 1].tolist()
        filled = [len(p.kept) for p in plain]
        assert [kept[5 * i : 5 * i + filled[i]] for i in range(2)] == [p.kept for p in plain]
        assert pool.filled.values.view(2, 5).sum(1).tolist() == filled


def test_half_of_what_is_shown_is_old() -> None:
    pool, old = ImagePool(50, (1,)), 0
    for step in range(1000):
        shown = asked(pool, torch.full((1, 1), float(step)), 0, 1, g(step))
        old += step >= 50 and shown.item() != step
    assert 420 < old < 530  # of 950, 15.4 is the standard deviation


def test_a_pool_of_nothing_hands_back_what_it_gets() -> None:
    images = torch.rand(3, 1, 2, 2, generator=g())
    assert asked(ImagePool(0, (1, 2, 2)), images, 0, 1, g()) is images


def test_what_an_update_adds_is_there_after_it_and_in_a_copy() -> None:
    """A rejected update leaves no trace, and a run resumed from its state shows the same images."""
    pool = ImagePool(4, (1,))
    for step in range(6):
        asked(pool, torch.full((2, 1), float(step)), 0, 1, g(step))
    state = copy.deepcopy(pool.state_dict())
    assert {key for key in state if "sum" in key} == set()
    begin_update([pool])
    pool.query(torch.full((2, 1), 99.0), 0, 1, g(7))
    assert torch.equal(pool.images.values, state["images.values"]), "the update has not ended"
    other = ImagePool(4, (1,))
    other.load_state_dict(state)
    for step in range(10, 30):
        x = torch.full((2, 1), float(step))
        assert torch.equal(asked(pool, x, 0, 1, g(step)), asked(other, x, 0, 1, g(step)))


def test_losses_are_the_papers() -> None:
    system = small(jitter=0, pool=0)
    batch = random_batch(system, 3)
    x, y = batch.images, batch["others"]
    G, F = system.generator.g, system.generator.f
    D_X, D_Y = _judges(system)
    with torch.no_grad():
        squares = ((D_Y(G(x)) - 1) ** 2).mean() + ((D_X(F(y)) - 1) ** 2).mean()
        cycle = (F(G(x)) - x).abs().mean() + (G(F(y)) - y).abs().mean()
        identity = (G(y) - y).abs().mean() + (F(x) - x).abs().mean()
        judged = sum(
            ((d(real) - 1) ** 2).mean() + (d(fake) ** 2).mean() for d, real, fake in ((D_X, x, F(y)), (D_Y, y, G(x)))
        )
    found = system.generator_loss(batch, g())
    torch.testing.assert_close(found.value.detach(), squares + 10 * cycle + 5 * identity)
    torch.testing.assert_close(system.discriminator_loss(batch, g()).value.detach(), judged / 2)
    plain = small(jitter=0, pool=0, identity=0.0).generator_loss(batch, g())
    torch.testing.assert_close(plain.value.detach(), squares + 10 * cycle)
    assert "distance/identity" not in plain.scalars


def test_generators_that_change_nothing_have_neither_loss() -> None:
    system = small(jitter=2)
    system.generator.g, system.generator.f = nn.Identity(), nn.Identity()
    scalars = system.generator_loss(random_batch(system), g()).scalars
    assert scalars["distance/cycle"] == scalars["distance/identity"] == 0


def test_discriminators_are_shown_the_pool() -> None:
    """Once it is full of old images, half of what D sees as made is old: the same fakes give other losses."""
    system = small(jitter=0, pool=4)
    batch = random_batch(system, 4)
    losses = []
    for step in range(8):
        begin_update([system.discriminator])
        losses.append(system.discriminator_loss(random_batch(system, 4, step), g(step)).value.item())
        end_update([system.discriminator])
    fresh = small(jitter=0, pool=0)
    assert losses[0] == pytest.approx(fresh.discriminator_loss(random_batch(system, 4, 0), g(0)).value.item())
    assert losses[-1] != pytest.approx(fresh.discriminator_loss(random_batch(system, 4, 7), g(7)).value.item())
    assert (system.discriminator.pool_x.filled.values == 1).all()
    assert batch.images.shape[1:] == system.discriminator.pool_y.images.values.shape[1:]


def test_a_sheet_shows_both_ways_round() -> None:
    system = small()
    batch = random_batch(system, 2)
    views = system.views(batch, g())
    assert list(views) == ["x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))"]
    assert torch.equal(views["G(x)"], system.sample_for(batch, g(1)))
    with torch.no_grad():
        assert torch.equal(views["G(x)"], system.generator.g(batch.images))
        assert torch.equal(views["G(F(y))"], system.generator.g(system.generator.f(batch["others"])))


def test_what_does_not_fit_is_refused() -> None:
    assert "6 images (system.config.pool) are no multiple of 4" in (small().refusal(4) or "")
    assert small().refusal(3) is small(pool=0).refusal(4) is None
    with pytest.raises(ValueError, match="30 is no multiple of 4"):
        CycleGANConfig(resolution=30, patch_layers=1)


def test_each_domain_and_each_slice_has_a_pool_of_its_own() -> None:
    system = small(jitter=0, pool=4)
    batches = [random_batch(system, 2, index, slice=index, slices=2) for index in range(2)]
    begin_update([system.discriminator])
    for batch in batches:
        system.discriminator_loss(batch, g())
    end_update([system.discriminator])
    with torch.no_grad():
        for index, batch in enumerate(batches):
            rows = slice(2 * index, 2 * index + 2)  # the first to come fill them in order
            for pool, made in (
                (system.discriminator.pool_x, system.generator.f(batch["others"])),
                (system.discriminator.pool_y, system.generator.g(batch.images)),
            ):
                torch.testing.assert_close(pool.images.values[rows], made)


def test_domains_are_jittered_each_by_itself() -> None:
    system = small(jitter=4)
    x = random_batch(system, 8).images
    a, b = system._domains(Batch(x, torch.zeros(8, dtype=torch.long), others=x), g())
    assert not torch.equal(a, b)
