"""Networks that `training.compile` may take become one graph, and compute what they computed before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from bessemer.systems.contract import Batch, Clock
from bessemer.systems.registry import build

CASES = {
    "nvae": ("nvae", "tiny32", {"width": 4, "groups": (1, 1), "flows": 1}, ["vae"]),
    "biggan": (
        "biggan", "tiny32", {"generator_width": 8, "discriminator_width": 8}, ["generator", "discriminator"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.compile's own code
@pytest.mark.parametrize("case", CASES)
def test_equals_eager_without_graph_breaks(case: str) -> None:
    name, preset, fields, compiled = CASES[case]
    system = build(name, preset, fields)
    system.init_weights(torch.Generator().manual_seed(0))
    for network in system.networks().values():
        network.train()
    images = 2 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 1
    update = system.updates(Clock(0, 0))[-1]
    found = []
    for _ in range(2):
        for network in system.networks().values():
            network.zero_grad(set_to_none=True)
        loss = update.loss(Batch(images, torch.arange(4)), torch.Generator().manual_seed(2)).value
        loss.backward()
        trained = dict(system.networks()[update.network].named_parameters())
        found.append((loss.detach(), {key: p.grad for key, p in trained.items()}))
        for key in compiled:  # the graphs are what counts here; generating code for them takes minutes
            system.networks()[key].compile(backend="eager")
    (eager, gradients), (again, same) = found
    torch.testing.assert_close(again, eager, rtol=1e-5, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], dict(counters["graph_break"])
    for key, gradient in gradients.items():
        torch.testing.assert_close(same[key], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
