"""One job on one, two and four workers is one run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bessemer.data.packing.pack import pack

States = dict[int, list[dict[str, Tensor]]]
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def states(run_script: object, tmp_path_factory: pytest.TempPathFactory) -> States:
    """Workers -> final state of each; ZeRO 0, 1 and 2."""
    data = tmp_path_factory.mktemp("digits") / "set"
    pack("digits", data, size=32)
    return {n: run_script("world_run.py", n, data) for n in (1, 2, 4)}  # type: ignore[operator]


def relative(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """‖a - b‖/‖a‖ over all tensors of `names`."""
    difference = torch.cat([(a[n] - b[n]).flatten() for n in names]).norm()
    return float(difference / torch.cat([a[n].flatten() for n in names]).norm())


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_fifty_steps_of_biggan_give_the_same_weights(states: States, network: str, workers: int) -> None:
    (alone,) = states[1]
    parameters = [k.removeprefix("start.") for k in alone if k.startswith(f"start.{network}.")]
    start = {k: alone[f"start.{k}"] for k in parameters}
    assert relative(alone, start, parameters) > 2e-3, "they must have moved for this test to say anything"
    for state in states[workers]:
        assert relative(alone, state, parameters) <= 1e-5
        for name in parameters:  # each by itself: nothing hides behind larger tensors
            if name.endswith("weight"):
                assert relative(alone, state, [name]) <= 5e-5, name


@pytest.mark.parametrize("workers", [2, 4])
def test_averages_statistics_and_samples_are_the_same(states: States, workers: int) -> None:
    (alone,) = states[1]
    averages = [k for k in alone if k.startswith("ema.") and not k.endswith(".u")]
    statistics = [k for k in averages if "running_" in k]
    assert statistics
    for state in states[workers]:
        assert relative(alone, state, averages) <= 1e-5
        assert relative(alone, state, statistics) <= 1e-5
        assert relative(alone, state, ["samples"]) <= 1e-4
    assert alone["samples"].std() > 0.01


@pytest.mark.parametrize("workers", [2, 4])
def test_all_workers_end_with_the_same_bits(states: States, workers: int) -> None:
    first, *others = states[workers]
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name
