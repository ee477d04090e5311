"""A network's optimizer: the paper's, the job's overrides, and the correction for lazy regularisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bessemer.errors import SpecError
from bessemer.spec.job import OptimizerSpec
from bessemer.systems.contract import Clock, OptimizerDefaults, Update
from bessemer.systems.registry import build
from bessemer.training.large_batch import LAMB, LARS
from bessemer.training.optimizers import build_optimizer, lazy_correction

NAMES = ("adam", "adamax", "rmsprop", "sgd", "lamb", "lars")


def optimizer(base: OptimizerDefaults | None = None, correction: float = 1.0, **own: Any) -> torch.optim.Optimizer:
    spec = OptimizerSpec.model_validate(own)
    return build_optimizer("g", nn.Linear(2, 2), base or OptimizerDefaults(), spec, correction)


def update(name: str, network: str = "d", **fields: Any) -> Update:
    return Update(name, network, lambda batch, draws: None, **fields)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_may_name_any_algorithm(name: str) -> None:
    made = optimizer(name=name, lr=0.5, weight_decay=0.25)
    assert type(made).__name__.lower() == name
    assert (made.param_groups[0]["lr"], made.param_groups[0]["weight_decay"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("sgd", "betas", [0, 0.9]), ("rmsprop", "betas", [0, 0.9]), ("sgd", "eps", 1e-3), ("adam", "momentum", 0.5),
     ("adam", "trust", 0.1), ("lars", "eps", 1e-3), ("lamb", "momentum", 0.9)],
)  # fmt: skip
def test_settings_that_an_algorithm_lacks_are_refused(name: str, setting: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"training\.optimizers\.g\.{setting}: {name} has no {setting}"):
        optimizer(name=name, **{setting: value})


def test_whole_numbers_from_yaml() -> None:
    assert optimizer(betas=[0, 0.99]).param_groups[0]["betas"] == (0.0, 0.99)


def test_the_papers_settings_stand_where_the_job_is_silent() -> None:
    group = optimizer(OptimizerDefaults("adamax", lr=1e-2, betas=(0.5, 0.9), eps=1e-7), lr=3e-2).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-2, (0.5, 0.9), 1e-7)


def test_stylegan2s_correction() -> None:
    """G every 4 and D every 16 iterations; lr 0.002 and betas (0, 0.99) of the paper's configuration."""
    updates = [
        update("d"),
        update("r1", interval=16, lazy=True),
        update("g", "g"),
        update("path", "g", interval=4, lazy=True),
    ]
    assert lazy_correction(updates, "d") == pytest.approx(16 / 17)
    assert lazy_correction(updates, "g") == pytest.approx(4 / 5)
    group = optimizer(OptimizerDefaults(lr=0.002, betas=(0.0, 0.99)), 4 / 5).param_groups[0]
    assert group["lr"] == pytest.approx(0.0016)
    assert group["betas"] == pytest.approx((0, 0.99**0.8))


def test_no_correction_without_lazy_regularisers() -> None:
    assert lazy_correction([update("d", repeats=5), update("rare", interval=3)], "d") == 1
    assert lazy_correction([], "d") == 1


def test_several_main_steps_weaken_the_correction() -> None:
    assert lazy_correction([update("d", repeats=4), update("r1", interval=2, lazy=True)], "d") == pytest.approx(8 / 9)


def test_over_one_period_corrected_steps_add_up_to_the_main_steps() -> None:
    k, beta = 16, 0.99
    c = lazy_correction([update("d"), update("r1", interval=k, lazy=True)], "d")
    group = optimizer(OptimizerDefaults(lr=1.0, betas=(0.5, beta)), c).param_groups[0]
    assert group["lr"] * (k + 1) == pytest.approx(k)
    assert group["betas"][1] ** (k + 1) == pytest.approx(beta**k)


@pytest.mark.parametrize(("name", "key"), [("rmsprop", "alpha"), ("sgd", "momentum"), ("lars", "momentum")])
def test_other_decay_rates_are_corrected_too(name: str, key: str) -> None:
    momentum = {} if key == "alpha" else {"momentum": 0.99}
    assert optimizer(None, 0.5, name=name, **momentum).param_groups[0][key] == pytest.approx(0.99**0.5)


def test_biggans_r1_is_lazy() -> None:
    with torch.device("meta"):
        plain = build("biggan", "tiny32", {}, {"channels": 1, "classes": 10})
        with_r1 = build("biggan", "tiny32", {"r1_gamma": 1.0, "r1_interval": 4}, {"channels": 1, "classes": 10})
    assert lazy_correction(plain.updates(Clock(0, 0)), "discriminator") == 1
    assert lazy_correction(with_r1.updates(Clock(0, 0)), "discriminator") == pytest.approx(4 / 5)
    assert lazy_correction(with_r1.updates(Clock(0, 0)), "generator") == 1


def trained(make: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative movement of a weight after three steps with all gradients multiplied by `scale`, and of a zero bias."""
    weight, bias = nn.Parameter(torch.arange(1.0, 7).view(2, 3)), nn.Parameter(torch.zeros(2))
    made = make([weight, bias])
    for step in range(3):
        weight.grad, bias.grad = scale * (weight.detach() - step).sin(), scale * torch.tensor([1.0, -1.0])
        made.step()
    return weight.detach(), bias.detach()


def test_lars_and_lamb_do_not_see_the_size_of_gradients() -> None:
    for make in (lambda p: LARS(p, lr=0.1, trust=0.1), lambda p: LAMB(p, lr=0.1, eps=1e-12)):
        small, large = trained(make, 1e-3)[0], trained(make, 1e3)[0]
        torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
        assert (small - torch.arange(1.0, 7).view(2, 3)).abs().max() > 1e-2


def test_a_zero_parameter_can_move() -> None:
    for make in (lambda p: LARS(p, lr=0.1), lambda p: LAMB(p, lr=0.1)):
        assert (trained(make, 1.0)[1].abs() > 1e-3).all()
