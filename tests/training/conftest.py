"""Starts groups of worker processes and reads what they leave."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parent / "scripts"

Launch = Callable[..., list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The tiny adversarial system, as a module."""
    spec = importlib.util.spec_from_file_location("tiny_run", SCRIPTS / "tiny_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_workers(size: int, *arguments: object, script: str = "tiny_run.py") -> list[subprocess.Popen[str]]:
    """Start `size` workers of a script, as torchrun would."""
    env = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def wait_for(processes: list[subprocess.Popen[str]], seconds: float = 120) -> None:
    """Wait until all have ended well; if one has not, the test fails with what they printed."""
    outputs = []
    try:
        # Read together: a worker whose pipe is full stands still, and the others wait for it.
        with ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(lambda p: p.communicate(timeout=seconds)[0], processes))
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(outputs)


RunScript = Callable[..., list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> RunScript:
    """``run_script(name, workers, *more)`` runs a script once on that many workers and returns what each wrote."""

    def run(script: str, size: int, *more: object) -> list[dict[str, torch.Tensor]]:
        out = tmp_path_factory.mktemp("run") / "out"
        wait_for(start_workers(size, out, *more, script=script), seconds=300)
        return [load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(size)]

    return run


@pytest.fixture
def run_planned(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``run_planned(workers, *more)`` runs planned_run.py (or `script`) and returns what its first worker wrote."""

    def run(size: int, *more: object, script: str = "planned_run.py") -> dict[str, Any]:
        out = tmp_path / "seen.json"
        wait_for(start_workers(size, out, *more, script=script), seconds=300)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """``launch(workers, stage, iterations, *more)`` trains and returns each worker's final state."""
    count = 0

    def run(
        size: int, stage: int, iterations: int, *more: object, script: str = "tiny_run.py"
    ) -> list[dict[str, torch.Tensor]]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        processes = start_workers(size, out, stage, iterations, *more, script=script)
        wait_for(processes)
        return [load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(size)]

    return run
