"""Groups of worker processes that start in a moment: forked from a server that has imported torch and DeepSpeed.

They are processes like any other, with pids to kill; only the imports, five seconds of each, are shared.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["free_port", "start_group", "wait_for_group"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.preload"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _main(work: Callable[..., int | None], rank: int, env: dict[str, str], log: Path, arguments: Any) -> None:
    """What a forked worker runs: `work(*arguments)` with its output in a file; ends with its exit code."""
    os.environ.update(env)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    import torch

    from bessemer.training.distributed import end_process

    torch.set_num_threads(1)
    try:
        code = work(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    end_process(code)


def start_group(work: Callable[..., int | None], size: int, log: Path, *arguments: Any) -> list[BaseProcess]:
    """Start `size` workers that run `work(*arguments)` with torchrun's environment."""
    port = free_port()
    group: list[BaseProcess] = []
    for rank in range(size):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # The server that forks them was started earlier, and has the environment of then.
        env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        process = CONTEXT.Process(target=_main, args=(work, rank, env, log, arguments), daemon=True)
        process.start()
        group.append(process)
    return group


def wait_for_group(group: list[BaseProcess], seconds: float) -> list[int | None]:
    """Exit codes once all have ended; a worker that outlives the time is killed and fails the test."""
    deadline = time.monotonic() + seconds
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in group if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(group)} workers did not end within {seconds} s"
    return [process.exitcode for process in group]
