"""The flagships in float64 under the real trainer: one worker and two train the same run, to 1e-8 in every weight."""

from __future__ import annotations

import pytest
import torch
from tests.systems.real_work import FLAGSHIPS, State, by_one_and_two, of, train_flagships_in_double

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[State]]:
    return by_one_and_two(train_flagships_in_double, tmp_path_factory.mktemp("flagships"), 300)


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_three_iterations_on_two_workers_are_those_of_one(states: dict[int, list[State]], name: str) -> None:
    """Weights, averages, spectral-norm vectors, BatchNorm statistics and ADA's p, by the papers' Adam or Adamax."""
    (alone,) = states[1]
    start, end = of(alone, "start", name), of(alone, "end", name)
    assert all(v.dtype == torch.float64 for v in end.values())
    moved = sum((end[k] - start[k]).abs().max().item() > 1e-5 for k in end)
    assert moved > 0.9 * len(end), "they must have moved for this test to say anything"
    for state in states[2]:
        other = of(state, "end", name)
        assert other.keys() == end.keys()
        for key, value in end.items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_lazy_regularisers_and_augmentation_took_part(states: dict[int, list[State]]) -> None:
    """Or StyleGAN2's equality would say less than it seems to."""
    (alone,) = states[1]
    start, end = of(alone, "start", "stylegan2"), of(alone, "end", "stylegan2")
    assert start["discriminator.augment.p"] == 0.3
    for key in ("discriminator.augment.p", "generator.path_length.mean", "generator.w_average.mean"):
        assert (end[key] - start[key]).abs().max() > 1e-4, key
