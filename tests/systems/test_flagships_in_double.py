"""The flagships in float64 under the real trainer: one worker and two train the same run, to 1e-8 in every weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.systems.real_work import FLAGSHIPS, train_flagships_in_double
from tests.training.forked import start_group, wait_for_group
from torch import Tensor

State = dict[str, Tensor]
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[State]]:
    """Workers -> what each of them wrote."""
    found = {}
    for size in (1, 2):
        out: Path = tmp_path_factory.mktemp("flagships") / "out"
        log = out.with_suffix(".log")
        codes = wait_for_group(start_group(train_flagships_in_double, size, log, out), 300)
        assert codes == [0] * size, log.read_text()
        found[size] = [load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(size)]
    return found


def of(state: State, moment: str, name: str) -> State:
    prefix = f"{moment} {name} "
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


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
