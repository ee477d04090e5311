"""Readings of machines."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from bessemer.training.distributed import Workers
from bessemer.training.node import NodeReadings, all_nodes


def test_a_reading_agrees_with_the_kernel() -> None:
    readings = NodeReadings()
    before = _busy()
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pass
    found, after = readings.take(), _busy()
    busy, total = (b - a for a, b in zip(before, after, strict=True))
    assert found["cpu_percent"] == pytest.approx(100 * busy / total, abs=25)  # counted in steps of 10 ms
    assert found["cpu_percent"] > 5
    with open("/proc/meminfo") as file:  # noqa: PTH123
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    assert found["memory_gib"] == pytest.approx((kib["MemTotal"] - kib["MemAvailable"]) / 2**20, abs=0.5)
    assert any(name.startswith("gpu0") for name in found) == torch.cuda.is_available()


def _busy() -> tuple[float, float]:
    """Time that processors were busy, and all their time."""
    with open("/proc/stat") as file:  # noqa: PTH123
        fields = list(map(int, file.readline().split()[1:9]))
    return sum(fields) - fields[3] - fields[4], sum(fields)


def test_one_worker_of_each_machine_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoMachines(Workers):
        def gather(self, value: Any) -> list[Any]:
            return [value, None, {"cpu_percent": 7.0}, None]

    workers = TwoMachines(rank=0, size=4, device=torch.device("cpu"))
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    found = all_nodes(NodeReadings(), workers)
    assert {"system/node0/cpu_percent", "system/node0/memory_gib"} <= set(found)
    assert found["system/node1/cpu_percent"] == 7.0
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert set(all_nodes(NodeReadings(), Workers(rank=0, size=1, device=torch.device("cpu")))) == set()
