"""Lets a group get its GPUs again and again on a Ray that believes to have four; a process of its own.

Ray gives ids away without looking at the machine, so that this needs no GPU; what CUDA makes of them does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bessemer.orchestration.group import Spares, _gpus_of, _in_order, environments
from bessemer.orchestration.room import Room
from bessemer.spec.load import load_job

__all__: list[str] = []

SEEN = ("4", "5", "6", "7")  # what the node may use, by its own CUDA_VISIBLE_DEVICES


@contextmanager
def others_with(gpus: int) -> Iterator[set[str]]:
    """Another program on the node that holds so many GPUs."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group([{"GPU": 1}] * gpus)
    assert group.wait(60)
    try:
        yield {gpu for each in _gpus_of(group, range(gpus)) for gpu in each}
    finally:
        remove_placement_group(group)


def own_devices(room: Room, spares: Spares) -> list[str]:
    """The GPU that each worker of a new group computes on, as its process would find it."""
    import ray

    with room.taken(lambda: False, print) as places:
        bundles, nodes = _in_order(places)
        found = environments(nodes, _gpus_of(places, bundles), "127.0.0.1", 1)
        processes = [spares.take(node) for node in nodes]

        def device(self: Any, environment: dict[str, str]) -> tuple[str, bool]:
            early = "deepspeed" in sys.modules or "torch._dynamo" in sys.modules
            os.environ.update(environment)  # as TrainWorker.train does first
            return os.environ["CUDA_VISIBLE_DEVICES"].split(",")[int(os.environ["LOCAL_RANK"])], early

        asked = [p.__ray_call__.remote(device, each) for p, each in zip(processes, found, strict=True)]
        answers = ray.get(asked, timeout=120)
        for process in processes:
            ray.kill(process)
        assert not any(early for _, early in answers), "a spare process asked CUDA for devices before it had its own"
        assert [device for device, _ in answers] == [gpu for each in _gpus_of(places, bundles) for gpu in each]
        return [device for device, _ in answers]


def main(job: str) -> None:
    spec = load_job(job, ["resources.gpus_per_worker=1"])
    room, spares = Room(spec), Spares(spec, wanted=True)
    with others_with(1) as theirs:
        first = own_devices(room, spares)
        assert len({*first, *theirs}) == 3
        assert {*first, *theirs} < set(SEEN)
        import ray

        spares.prepare([ray.get_runtime_context().get_node_id()] * 2, threading.Event())
        waiting = [process for process, _ in next(iter(spares._waiting.values()))]
        assert len(waiting) == 2, "they step in for the workers, which were killed"
        with others_with(1) as more:  # takes the first's
            again = own_devices(room, spares)
            assert len({*again, *theirs, *more}) == 4, "each has one of its own"
            assert not any(spares._waiting.values()), "the spare processes were not taken"
    spares.end()


if __name__ == "__main__":
    import ray

    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(SEEN)
    with tempfile.TemporaryDirectory(prefix="bsm-", dir="/tmp") as place:
        ray.init(
            address="local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=place,
            object_store_memory=100 << 20,
        )  # fmt: skip
        main(sys.argv[1])
        ray.shutdown()
    print("gpu ok")
