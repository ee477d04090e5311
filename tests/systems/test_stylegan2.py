"""Losses of StyleGAN2 against finite differences and Jacobians; what moves with its updates; its sampler."""

from collections.abc import Callable

import pytest
import torch
from tests.systems.small_stylegan2 import batch_of, double, draws, only, small
from torch import Tensor

from bessemer.errors import SpecError
from bessemer.nn.update_state import begin_update, end_update
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build
from bessemer.training.optimizers import lazy_correction


def test_optimizers_and_their_correction() -> None:
    with torch.device("meta"):
        system = build("stylegan2", "config-f")
        cifar = build("stylegan2", "cifar")
    optimizers = system.optimizers()
    for network in ("generator", "discriminator"):
        o = optimizers[network]
        assert (o.name, o.lr, o.betas, o.eps) == ("adam", 0.002, (0.0, 0.99), 1e-8)
    updates = system.updates(Clock(0, 0))
    assert [(u.name, u.interval) for u in updates] == [
        ("generator", 1),
        ("path_length", 4),
        ("discriminator", 1),
        ("r1", 16),
    ]
    assert lazy_correction(updates, "generator") == pytest.approx(4 / 5)
    assert lazy_correction(updates, "discriminator") == pytest.approx(16 / 17)
    assert [u.name for u in cifar.updates(Clock(0, 0))] == ["generator", "discriminator", "r1"]


def test_losses_by_hand() -> None:
    system, batch = small(augment="none", style_mixing=0.0), batch_of()
    G, D = system.generator, system.discriminator

    def fake(g: torch.Generator) -> Tensor:
        torch.randint(4, (4,), generator=g)  # labels, which these networks ignore
        w = G.mapping(torch.randn(4, 6, generator=g), batch.labels)
        return D(G.synthesis(G.broadcast(w), G.synthesis.draw_noise(4, g)), batch.labels)

    real, generated = torch.sigmoid(D(batch.images, batch.labels)), torch.sigmoid(fake(draws(2)))
    torch.testing.assert_close(system.generator_loss(batch, draws(2)).value, -generated.log().mean())
    loss = system.discriminator_loss(batch, draws(2))
    torch.testing.assert_close(loss.value, -real.log().mean() - (1 - generated).log().mean())
    assert not any(s.requires_grad or s.ndim for s in loss.scalars.values())


def test_style_mixing() -> None:
    system = small(style_mixing=0.9)
    n, labels = 2000, torch.zeros(2000, dtype=torch.long)
    G, g = system.generator, draws(3)
    first, second = (G.mapping(torch.randn(n, 6, generator=g), labels) for _ in range(2))
    ws = system._ws(labels, draws(3))
    from_first = (ws == first[:, None]).all(2)
    assert torch.equal(torch.where(from_first[:, :, None], first[:, None], second[:, None]), ws)
    layers = from_first.sum(1)  # of six
    assert (from_first.long().diff(dim=1) <= 0).all(), "the first latent makes the first layers"
    assert (layers < 6).double().mean().item() == pytest.approx(0.9, abs=0.03)
    shares = torch.bincount(layers, minlength=7)[1:6] / (layers < 6).sum()
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.05)


def test_average_w_and_path_length_move_once_per_update() -> None:
    system = small(style_mixing=0.9)
    G, labels = system.generator, torch.zeros(4, dtype=torch.long)
    networks = system.networks().values()
    z = [torch.randn(4, 6, generator=draws(i)) for i in range(3)]
    begin_update(networks)
    for one in z:
        G.map(one, labels)
    assert (G.w_average.mean == 0).all()
    end_update(networks)
    mean = torch.stack([G.mapping(one, labels).mean(0) for one in z]).mean(0)
    torch.testing.assert_close(G.w_average.mean, 0.005 * mean)
    before = G.w_average.mean.clone()
    for update in system.updates(Clock(0, 0)):
        begin_update(networks)
        loss = update.loss(batch_of(), draws(1))
        end_update(networks)
        if update.name == "path_length":
            torch.testing.assert_close(G.path_length.mean, 0.01 * loss.scalars["path_length"][None])
        if update.name == "r1":
            assert torch.equal(G.w_average.mean, before), "no latents, no change"
        before = G.w_average.mean.clone()
    G.eval()
    begin_update(networks)
    system.sample(labels, draws())
    end_update(networks)
    assert torch.equal(G.w_average.mean, before)


def _numerical(value: Callable[[], float], p: Tensor, direction: Tensor, step: float = 1e-7) -> float:
    """Derivative of `value` along a direction; the step is small because leaky ReLUs have kinks."""
    values = []
    for sign in (1, -1):
        p.data.add_(direction, alpha=sign * step)
        values.append(value())
        p.data.add_(direction, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", ["r1", "path_length"])
@pytest.mark.parametrize("conditional", [False, True])
def test_second_order_losses_against_finite_differences(name: str, conditional: bool) -> None:
    system = double(augment_p=1.0, conditional=conditional, classes=10)
    batch = batch_of(2, dtype=torch.float64)
    (update,) = (u for u in system.updates(Clock(0, 0)) if u.name == name)
    only(system, update)
    update.loss(batch, draws(1)).value.backward()
    checked = 0
    for i, (key, p) in enumerate(system.networks()[update.network].named_parameters()):
        assert p.grad is not None, key
        direction = torch.randn(p.shape, generator=draws(i), dtype=p.dtype) * (100 if "mapping" in key else 1)
        expected = _numerical(lambda: update.loss(batch, draws(1)).value.item(), p, direction)
        actual = (p.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=2e-3, abs=1e-5), key
        checked += abs(expected) > 1e-4
    assert checked >= 10, "most weights must matter for the comparison to mean something"


def test_r1_is_the_squared_gradient_at_the_image() -> None:
    system = double(augment_p=1.0, r1_gamma=3.0, r1_interval=5, channels=1)
    batch, step = batch_of(1, channels=1, dtype=torch.float64), 1e-5
    flat = batch.images.flatten()
    scores = []
    for sign in (1, -1):
        with torch.no_grad():
            moved = (flat + sign * step * torch.eye(len(flat), dtype=flat.dtype)).view(-1, 1, 1, 16, 16)
            scores.append(torch.stack([system._judge(m, batch.labels, draws(1))[0] for m in moved]))
    gradient = (scores[0] - scores[1]) / (2 * step)
    total = gradient.square().sum().item()
    assert system.r1_loss(batch, draws(1)).scalars["penalty/r1"].item() == pytest.approx(total, rel=1e-4)
    assert system.r1_loss(batch, draws(1)).value.item() == pytest.approx(5 * 3 / 2 * total, rel=1e-4)


def test_path_length_is_that_of_the_jacobian() -> None:
    system, batch = double(style_mixing=0.0, path_length_shrink=2), batch_of(2, dtype=torch.float64)
    G = system.generator
    with torch.no_grad():
        G.path_length.mean.fill_(0.2)
    loss = system.path_length_loss(batch, draws(1))
    g = draws(1)
    torch.randint(2, (1,), generator=g)
    ws = G.broadcast(G.mapping(torch.randn(1, 6, generator=g), batch.labels)).detach()
    noise = G.synthesis.draw_noise(1, g)
    y = torch.randn(1, 3, 16, 16, generator=g, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda w: G.synthesis(w, noise), ws)  # [1, 3, 16, 16, 1, 6, 6]
    finite = (G.synthesis(ws + 1e-6, noise) - G.synthesis(ws - 1e-6, noise)) / 2e-6
    torch.testing.assert_close(J.sum((4, 5, 6)), finite, rtol=1e-5, atol=1e-6)
    products = torch.einsum("nchwmld,nchw->ld", J, y) / 16
    length = products.square().sum(1).mean().sqrt()
    torch.testing.assert_close(loss.scalars["path_length"], length)
    torch.testing.assert_close(loss.value, 4 * 2 * (length - 0.2) ** 2)


def test_truncation() -> None:
    system = small()
    G = system.generator.eval()
    G.w_average.mean.normal_(generator=draws(4))
    labels = torch.arange(6)
    torch.testing.assert_close(system.sample(labels, draws(1), 1.0), system.sample(labels, draws(1)))
    ws = G.broadcast(torch.ones(1, 6), 0.7)
    torch.testing.assert_close(ws, (0.3 * G.w_average.mean + 0.7).expand(1, 6, 6))
    noise = G.synthesis.draw_noise(1, draws(2))
    assert torch.equal(G.synthesis(ws, noise), G.synthesis(ws, noise))
    alone = G.synthesis(ws, noise)
    both = G.synthesis(ws.expand(2, -1, -1), noise)
    torch.testing.assert_close(both, alone.expand(2, -1, -1, -1))  # one image goes the fused way


def test_classes_count_where_the_networks_are_conditional() -> None:
    for conditional in (True, False):
        system = small(conditional=conditional, classes=10)
        system.generator.eval()
        first, second = (system.sample(torch.tensor([label] * 2), draws()) for label in (0, 1))
        scores = [system.discriminator(first, torch.tensor([label] * 2)) for label in (0, 1)]
        assert torch.equal(first, second) != conditional
        assert torch.equal(*scores) != conditional
    with pytest.raises(SpecError, match="conditional true needs labels"):
        small(conditional=True, classes=1)
    with pytest.raises(SpecError, match="augment bgc knows colours of 1 or 3"):
        small(channels=4)


def test_p_moves_with_the_iterations_and_is_the_networks_state() -> None:
    system = small(augment_p=0.0, augment_kimg=0.1, augment_interval=4, augment_target=-0.9)
    augment = system.discriminator.augment
    assert augment is not None
    values = []
    for iteration in range(1, 9):
        begin_update([system.discriminator])
        augment.observe(torch.ones(4))
        end_update([system.discriminator])
        system.after_iteration(Clock(nimg=4 * iteration, iteration=iteration))
        values.append(round(augment.p.item(), 6))
    assert values == [0, 0, 0, 0.16, 0.16, 0.16, 0.16, 0.32]
    names = set(system.discriminator.state_dict())
    assert {"augment.p", "augment.signs", "augment.count"} <= names
    fixed = small(augment_target=None)
    fixed.discriminator.augment.observe(torch.ones(4))  # type: ignore[union-attr]
    fixed.after_iteration(Clock(16, 4))
    assert fixed.discriminator.augment.p.item() == pytest.approx(0.7)  # type: ignore[union-attr]
