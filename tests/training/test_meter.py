"""Where the time of a step goes, and how many operations it takes."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from bessemer.systems.contract import Clock, SystemConfig
from bessemer.tracking.journal import read_journal
from bessemer.training.costs import FlopCount
from bessemer.training.devices import DEVICES, find_device, matmul_peak, peak_flops
from bessemer.training.meter import PARTS, StepMeter

CPU = torch.device("cpu")


def test_an_inner_part_is_not_the_outers() -> None:
    meter = StepMeter(CPU, "fp32")
    begun = time.perf_counter()
    with meter.part("backward"):
        time.sleep(0.01)
        with meter.part("communicate"):
            time.sleep(0.05)
        time.sleep(0.01)
    with meter.part("communicate"):
        time.sleep(0.01)
    time.sleep(0.01)  # in no part
    wall = time.perf_counter() - begun
    seconds = meter.take_seconds()
    assert list(seconds) == list(PARTS)
    assert seconds["communicate"] >= 0.06
    assert seconds["backward"] >= 0.02
    assert seconds["backward"] + seconds["communicate"] <= wall - 0.01
    assert meter.take_seconds() == dict.fromkeys(PARTS, 0.0)


def test_a_part_that_raises_ends() -> None:
    meter = StepMeter(CPU, "fp32")
    with pytest.raises(ZeroDivisionError), meter.part("forward"), meter.part("communicate"):
        raise ZeroDivisionError
    time.sleep(0.01)
    with meter.part("data"):
        pass
    assert sum(meter.take_seconds().values()) < 0.01


def test_operations_are_those_of_the_papers_formulas() -> None:
    """2·N·Ho·Wo·Ci·Co·k² forward, the same for each of the two gradients, and N·k·Co for a matrix product."""
    conv = nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 10, 10, requires_grad=True)
    forward = 2 * 2 * 100 * 3 * 8 * 9
    with FlopCount() as count:
        y = conv(x)
    assert count.total == forward
    with FlopCount() as count:
        y.square().sum().backward()
    assert count.total == 2 * forward
    with FlopCount() as count:
        torch.randn(4, 5) @ torch.randn(5, 6)
    assert count.total == 2 * 4 * 5 * 6


def test_slices_count_once_and_in_both_orders(tiny: ModuleType) -> None:
    system = tiny.TinyGan(SystemConfig(resolution=2))
    meter = StepMeter(CPU, "fp32")
    for _ in range(2):
        for update in system.updates(Clock(0, 0)):
            for name, network in system.networks().items():
                network.requires_grad_(name == update.network)
            with meter.slice(update.name):
                update.loss(tiny.real_slice(0, 0), tiny.generator("cpu", 0)).value.backward()
    g, d = 2 * 4 * (5 * 16 + 16 * 12), 2 * 4 * (12 * 17 + 17)  # forward passes of a slice of four
    per_slice = meter.flops_per_slice
    # D: both passes of D with the gradients of its weights, and of its hidden layer
    assert per_slice["discriminator"] == g + 2 * (2 * d + 2 * 4 * 17)
    # G: through all of the frozen D, then the weights of G and its hidden layer
    assert per_slice["generator"] == g + 2 * d + g + 2 * 4 * 16 * 12
    assert per_slice["r1"] > 4 * d  # forward and gradient, and backward through both
    peak = 1e9
    meter._peak = peak
    assert meter.take_mfu(0.5) == pytest.approx(2 * sum(per_slice.values()) / (0.5 * peak))
    assert meter.take_mfu(0.5) == 0


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2)])
def test_the_journal_holds_the_breakdown(launch: object, tmp_path: Path, workers: int, stage: int) -> None:
    launch(workers, stage, 6, "--run", tmp_path / "run")  # type: ignore[operator]
    lines = [r for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["kind"] == "metrics"]
    assert lines
    for line in lines:
        seconds = {name: line["values"][f"time/{name}"] for name in PARTS}
        assert all(value > 0 for value in seconds.values()), seconds
        assert 0 < line["values"]["throughput/mfu"] < 1
        if workers == 1:  # with several, each begins its first line when it is ready
            assert sum(seconds.values()) <= 1000 / line["values"]["throughput/img_per_s"]


@pytest.mark.gpu
def test_events_tell_the_time_of_the_gpu() -> None:
    device = torch.device("cuda")
    meter = StepMeter(device, "fp32")
    a = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(1500):  # more events than are kept
        with meter.part("backward"):
            a @ a
            with meter.part("communicate"):
                a @ a
    seconds = meter.take_seconds()
    wall = time.perf_counter() - begun
    assert min(seconds["backward"], seconds["communicate"]) > 0
    assert sum(seconds.values()) <= wall


def test_known_devices() -> None:
    for name, key in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-32GB", "v100"),
    ):
        assert find_device(name) is DEVICES[key]
    for name in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090"):
        assert find_device(name) is None
    assert "bf16" not in DEVICES["v100"].peaks


def test_the_peak_of_the_cpu_is_measured() -> None:
    """Above what Python itself could do, below any CPU there is."""
    assert 1e8 < matmul_peak(torch.float32) < 1e14
    assert peak_flops(torch.device("meta"), "fp32") is None
