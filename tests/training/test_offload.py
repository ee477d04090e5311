"""Optimizer states in the host's memory: the same training, and on a GPU less of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.forked import start_group, wait_for_group
from torch import nn

from bessemer.spec.job import EmaSpec, TrainingSpec
from bessemer.systems.contract import OptimizerDefaults
from bessemer.training.distributed import init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.engine import build_engines
from bessemer.training.fragments import gather_full

WIDTH, STEPS, SLICES = 512, 4, 2
PARAMETERS = 2 * 64 * WIDTH + WIDTH + 64


def train(root: Path, stage: int) -> None:
    """Train a perceptron with and without offloading; leave weights, and where everything lay."""
    with join_workers() as workers:
        init_deepspeed(workers.device)
        device, out = workers.device, {}
        for offload in ("none", "optimizer"):
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64)).to(device)
            spec = TrainingSpec(
                total_kimg=1, batch_size=4, slice_size=1, zero_stage=stage, offload=offload, gradient_clipping=0.5
            )
            engine = build_engines({"net": net}, {"net": OptimizerDefaults(lr=1e-3)}, spec, workers)["net"]
            average = ShardedEma(engine, EmaSpec(), workers)
            for step in range(STEPS):
                for part in range(SLICES):
                    draws = torch.Generator().manual_seed(100 * step + 10 * part + workers.rank)
                    x = torch.randn(4, 64, generator=draws).to(device)
                    engine.backward((net(x) - x).square().mean() / SLICES)
                engine.step()
                average.update(16, 16 * step)
            kinds = {"weight": engine.fragments(), **engine.state_fragments(), **average.kinds()}
            for kind, fragments in kinds.items():
                whole = gather_full(fragments, engine.shapes, workers)
                out |= {f"{offload}/{kind}.{name}": value.cpu() for name, value in whole.items()}
                out[f"{offload}/on host/{kind}"] = torch.tensor(all(f.data.device.type == "cpu" for f in fragments))
            out[f"{offload}/norm"] = engine.gradients.norm.cpu()
            assert engine.gradients.norm.device == device
            if device.type == "cuda":
                out[f"{offload}/bytes"] = torch.tensor(torch.cuda.memory_allocated() - before)
        save_file(out, root / f"{stage}.{workers.rank}.safetensors")


def outcome(root: Path, stage: int, workers: int) -> dict[str, torch.Tensor]:
    group = start_group(train, workers, root / "log", root, stage)
    assert wait_for_group(group, 120) == [0] * workers, (root / "log").read_text()
    return load_file(root / f"{stage}.0.safetensors")


def check_equal(found: dict[str, torch.Tensor]) -> None:
    names = [k.removeprefix("none/") for k in found if k.startswith("none/") and k.endswith(("weight", "bias"))]
    assert {"weight.0.weight", "exp_avg.2.bias", "exp_avg_sq.0.weight", "ema.2.weight"} <= set(names)
    for name in [*names, "norm"]:
        torch.testing.assert_close(found[f"optimizer/{name}"], found[f"none/{name}"], rtol=1e-5, atol=1e-6)
    assert all(found[f"optimizer/on host/{kind}"] for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"))


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_workers_train_alike(tmp_path: Path, stage: int) -> None:
    check_equal(outcome(tmp_path, stage, 2))


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gpu_is_relieved(tmp_path: Path, stage: int) -> None:
    """Both moments and the average leave it, and at ZeRO 1 and 2 the fp32 weights that are stepped."""
    found = outcome(tmp_path, stage, 1)
    check_equal(found)
    assert not any(found[f"none/on host/{kind}"] for kind in ("weight", "exp_avg", "ema"))
    copies = 3 if stage == 3 else 4
    assert found["none/bytes"] - found["optimizer/bytes"] > 0.6 * copies * 4 * PARAMETERS
