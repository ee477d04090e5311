"""Starts groups of worker processes and reads what they leave."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


def start_workers(size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start `size` workers of tiny_run.py, as torchrun would."""
    env = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(SCRIPTS / "tiny_run.py"), *map(str, arguments)]
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


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """``launch(workers, stage, iterations, *more)`` trains and returns each worker's final state."""
    count = 0

    def run(size: int, stage: int, iterations: int, *more: object) -> list[dict[str, torch.Tensor]]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        processes = start_workers(size, out, stage, iterations, *more)
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        assert [p.returncode for p in processes] == [0] * size, "\n".join(outputs)
        return [load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(size)]

    return run
