"""NVAE under the real engines at ZeRO 1 and 3: one run on one worker and on two, and a guard that holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bessemer.data.packing.pack import pack

States = dict[int, list[dict[str, Tensor]]]
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def states(run_script: object, tmp_path_factory: pytest.TempPathFactory) -> States:
    """Workers -> final state of each."""
    data = tmp_path_factory.mktemp("digits") / "set"
    pack("digits", data, size=32, limit=64)
    return {n: run_script("nvae_run.py", n, data) for n in (1, 2)}  # type: ignore[operator]


def of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    return float(difference / torch.cat([a[k].flatten() for k in a]).norm())


@pytest.mark.parametrize("run", ["regularised", "plain"])
def test_three_steps_on_two_workers_are_those_of_one(states: States, run: str) -> None:
    """Regularised at ZeRO 1; at ZeRO 3 without the regularisation, which reads whole weights."""
    (alone,), pair = states[1], states[2]
    assert relative(of(alone, run), of(alone, f"start of {run}")) > 1e-3, "they must have moved to say anything"
    for state in pair:
        assert relative(of(alone, run), of(state, run)) <= 1e-6
    assert all(torch.equal(v, pair[1][k]) for k, v in pair[0].items())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slice_of_nan_on_one_worker_leaves_weights_and_statistics_alone(states: States, workers: int) -> None:
    for state in states[workers]:
        before, after = of(state, "regularised"), of(state, "after nan")
        assert all(v.isfinite().all() for v in after.values())
        kept = {k for k in before if not k.startswith("penalty.u")}  # which only follow the weights
        assert all(torch.equal(before[k], after[k]) for k in kept)
