"""The equality matrix: every kind of loss, stage, number of workers, accumulation and optimizer against plain loops."""

from __future__ import annotations

import functools
import itertools

import pytest
from tests.training.plain import METHODS, PlainLoop
from torch import Tensor


@functools.cache
def expected(method: str, slices: int, optimizer: str) -> dict[str, Tensor]:
    return PlainLoop(method, slices, optimizer).run()


@pytest.fixture(scope="module")
def results(run_script: object) -> dict[int, list[dict[str, Tensor]]]:
    """Workers -> what each of them ended with, over all cells. The processes start once per number of workers."""
    return {workers: run_script("matrix_run.py", workers) for workers in (1, 2)}  # type: ignore[operator]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adamax", "rmsprop"])
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_equals_a_plain_loop(
    results: dict[int, list[dict[str, Tensor]]], method: str, stage: int, workers: int, slices: int, optimizer: str
) -> None:
    wanted = expected(method, slices * workers, optimizer)
    for rank, state in enumerate(results[workers]):
        cell = f"{method}/{stage}/{slices}/{optimizer}/"
        got = {k.removeprefix(cell): v for k, v in state.items() if k.startswith(cell)}
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            error = (got[name] - value).abs().max().item()
            bound = 1e-6 if not name.startswith("grad_norm/") else 1e-6 * (1 + float(value))
            assert error <= bound, f"rank {rank}, {name}: differs by {error}"


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_moves(method: str) -> None:
    """Equality says nothing about what stands still."""
    before, after = PlainLoop(method, 1, "adam"), PlainLoop(method, 1, "adam")
    after.run()
    for name, parameters in before.p.items():
        for key, value in parameters.items():
            # A critic's last bias cancels out of Wasserstein's loss.
            still = method == "wgan_gp" and (name, key) == ("discriminator", "2.bias")
            assert still or (after.p[name][key] - value).abs().max() > 1e-4, f"{name}.{key}"


def test_the_cells_differ() -> None:
    """No cell passes with the weights of another."""
    cells = list(itertools.product(METHODS[:-1], (1, 4), ("adam", "adamax", "rmsprop")))
    states = {cell: expected(*cell)["discriminator.0.weight"] for cell in cells}
    for a, b in itertools.combinations(cells, 2):
        if {a[0], b[0]} != {"hinge", "path_length"}:  # the path length moves the generator only
            assert (states[a] - states[b]).abs().max() > 1e-5, (a, b)
