"""Every system under the real trainer: the same run on one and two workers, and after a resume at a random point."""

from __future__ import annotations

import pytest
import torch
from tests.systems.real_work import State, by_one_and_two, of, train_every_system
from torch import Tensor

from bessemer.systems.registry import all_systems

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


RESTING = {
    "dbn": ("rbm1.begun",),  # the first layer is trained from the start
    "glow": (".permutation", ".signs"),  # factors of the 1x1 convolutions that are drawn once
    "wgan-gp": ("critic.linear.bias",),  # scores count by their differences
}
"""Endings of what stays as it was, with the reason."""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[State]]:
    return by_one_and_two(train_every_system, tmp_path_factory.mktemp("systems"), 400)


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("name", list(all_systems()))
def test_one_worker_and_two_train_the_same_run(states: dict[int, list[State]], name: str) -> None:
    """To a hundredth of what each tensor moved: a bound on values would not see other gradients at so small a rate."""
    (alone,), pair = states[1], states[2]
    expected, start = of(alone, "sgd", name), of(alone, "start", name)
    moved = {k: largest(v - start[k]) for k, v in expected.items()}
    rounding = {k: 3e-7 * largest(v) for k, v in expected.items()}
    assert sum(moved[k] > 10 * rounding[k] for k in moved) > len(moved) / 2, "most must move for this to mean something"
    for state in pair:
        for key, value in of(state, "sgd", name).items():
            assert largest(value - expected[key]) <= 0.01 * moved[key] + rounding[key], key
    first, second = (of(state, "sgd", name) for state in pair)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.parametrize("name", list(all_systems()))
def test_a_run_resumed_at_a_random_point_ends_bit_by_bit_alike(states: dict[int, list[State]], name: str) -> None:
    (alone,) = states[1]
    straight, resumed = of(alone, "straight", name), of(alone, "resumed", name)
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("name", list(all_systems()))
def test_every_weight_has_been_trained(states: dict[int, list[State]], name: str) -> None:
    """By the papers' optimizers; a weight that stays where it was is one that no stage reaches."""
    (alone,) = states[1]
    start, end = of(alone, "start", name), of(alone, "straight", name)
    still = {k for k, v in end.items() if not k.startswith("ema.") and torch.equal(v, start[k])}
    assert still == {k for k in start if not k.startswith("ema.") and k.endswith(RESTING.get(name, ()))}
