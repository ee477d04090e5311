"""How busy the machines of a run are: processors, memory and GPUs of each, for its lines of metrics."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch

from bessemer.training.distributed import Workers

__all__ = ["NodeReadings", "all_nodes"]


class NodeReadings:
    """Reads this machine. Nothing is measured in between; a reading takes well below a millisecond."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # from here on

    def take(self) -> dict[str, float]:
        """CPU and GPU in percent since the last call, memory in GiB now."""
        memory = psutil.virtual_memory()
        found = {"cpu_percent": psutil.cpu_percent(), "memory_gib": (memory.total - memory.available) / 2**30}
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                found[f"gpu{index}_memory_gib"] = (total - free) / 2**30
                try:
                    found[f"gpu{index}_percent"] = float(torch.cuda.utilization(index))
                except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is not there, or the driver says nothing
                    continue
        return found


def all_nodes(readings: NodeReadings, workers: Workers) -> dict[str, float]:
    """`system/node0/cpu_percent` and so on: one worker of each machine reads it. Collective.

    Args:
        readings: of this worker.
        workers: the group; machines are numbered by their first worker.
    """
    reads = int(os.environ.get("LOCAL_RANK", "0")) == 0
    mine: dict[str, Any] | None = readings.take() if reads else None
    nodes = [reading for reading in workers.gather(mine) if reading is not None]
    return {f"system/node{index}/{name}": value for index, node in enumerate(nodes) for name, value in node.items()}
