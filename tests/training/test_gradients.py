"""Norms, clipping, sanitising, skipping and the loss scale on one worker; several are in test_engine.py."""

from __future__ import annotations

import pytest
import torch

from bessemer.spec.job import TrainingSpec
from bessemer.training.distributed import Workers
from bessemer.training.gradients import Gradients, LossScale

ALONE = Workers(rank=0, size=1, device=torch.device("cpu"))


def gradients_of(**fields: object) -> Gradients:
    spec = TrainingSpec.model_validate({"total_kimg": 1, "batch_size": 4, "slice_size": 4, **fields})
    return Gradients(spec, ALONE, sharded=False)


def test_the_norm_is_over_all_parameters_and_before_clipping() -> None:
    treated, g = gradients_of(gradient_clipping=1.0), [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert treated.ready(g)
    assert treated.norm == pytest.approx(5)
    assert torch.cat([x.flatten() for x in g]).tolist() == pytest.approx([0.6, 0, 0.8], rel=1e-5)


def test_short_gradients_are_not_clipped() -> None:
    treated, g = gradients_of(gradient_clipping=10.0), [torch.tensor([3.0, 4.0])]
    assert treated.ready(g)
    assert g[0].tolist() == [3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_no_step(bad: float) -> None:
    treated = gradients_of(gradient_clipping=1.0)
    assert not treated.ready([torch.tensor([1.0, bad])])
    assert (treated.norm, treated.skipped) == (None, 1)
    assert treated.ready([torch.ones(2)])
    assert treated.skipped == 1
    assert treated.norm is not None


def test_a_gradient_longer_than_the_limit_is_no_step() -> None:
    treated, g = gradients_of(skip_gradient_norm=4.0, gradient_clipping=1.0), [torch.tensor([3.0, 4.0])]
    assert not treated.ready(g)
    assert (treated.norm, treated.skipped, treated.too_long) == (None, 1, True)
    assert g[0].tolist() == [3, 4]
    assert treated.ready([torch.tensor([0.0, 4.0])])
    assert (treated.skipped, treated.too_long) == (1, False)
    assert not treated.ready([torch.tensor([float("inf")])])
    assert not treated.too_long, "what is not finite has no length"


def test_sanitising_uses_stylegans_values() -> None:
    treated, g = gradients_of(sanitize_gradients=True), [torch.tensor([float("nan"), float("inf"), -float("inf"), 2])]
    assert treated.ready(g)
    assert g[0].tolist() == [0, 1e5, -1e5, 2]
    assert treated.skipped == 0


def test_the_loss_scale_halves_on_overflow_and_doubles_with_patience() -> None:
    scale = LossScale(initial=8.0, patience=3)
    for finite, value in [(True, 8), (False, 4), (True, 4), (True, 4), (True, 8), (True, 8), (False, 4)]:
        scale.moved(finite)
        assert scale.value == value


def test_the_loss_scale_goes_on_where_it_was_saved() -> None:
    straight, first, second = LossScale(patience=3), LossScale(patience=3), LossScale(patience=3)
    outcomes = [True, False, True, True, True, True, False, True]
    for finite in outcomes:
        straight.moved(finite)
    for finite in outcomes[:4]:
        first.moved(finite)
    second.load_state_dict(first.state_dict())
    for finite in outcomes[4:]:
        second.moved(finite)
    assert second.state_dict() == straight.state_dict()


def test_half_precision_unscales_before_it_measures() -> None:
    treated = gradients_of(precision="fp16")
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    treated.scaled((weight * torch.tensor([0.6, 0.8])).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.norm() == 2.0**16
    assert treated.ready([weight.grad])
    assert treated.norm == pytest.approx(1)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8])
