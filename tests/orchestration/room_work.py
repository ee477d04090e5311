"""Asks a Ray of two cores for room, beside somebody else who takes one; a process of its own, since Ray stays in it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from bessemer.errors import MachineError
from bessemer.orchestration.group import Spares
from bessemer.orchestration.launch import ray_session
from bessemer.orchestration.room import Room
from bessemer.spec.load import load_job

__all__: list[str] = []

TWO = ["resources.workers=2", "resources.cpus_per_worker=1"]


def found(room: Room, said: list[str], stop: Callable[[], bool] = lambda: False) -> int | None:
    with room.taken(stop, said.append) as places:
        return None if places is None else len(places.bundle_specs)


def refusal(room: Room, said: list[str]) -> str:
    try:
        places = found(room, said)
    except MachineError as e:
        return str(e)
    raise AssertionError(f"found room for {places}")


def main(job: str) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    fixed = Room(load_job(job, [*TWO, "resources.wait_s=0"]))
    elastic = Room(load_job(job, [*TWO, "resources.min_workers=1"]))
    said: list[str] = []
    assert found(fixed, said) == 2
    somebody = placement_group([{"CPU": 1}])
    assert somebody.wait(30)
    assert found(elastic, said) == 1
    text = refusal(fixed, said)
    assert "2 worker(s) with 1 CPU each are asked for" in text, text
    assert "have 2 CPU together, of which 1 free" in text, text
    text = refusal(Room(load_job(job, [*TWO, "resources.wait_s=0", "resources.gpus_per_worker=1"])), said)
    assert "2 worker(s) with 1 CPU and 1 GPU each" in text, text
    assert "have 2 CPU, 0 GPU together" in text, text
    assert said == []
    patient = Room(load_job(job, [*TWO, "resources.wait_s=60"]))
    assert found(patient, said, lambda: bool(said)) is None, "nobody wanted to wait any more"
    assert "waiting up to 60 s" in said[0], said

    come, placed = threading.Event(), threading.Event()
    joined: list[str] = []

    def more(nodes: list[str], over: threading.Event) -> None:
        assert not over.is_set()
        joined.extend(nodes)
        come.set()

    with elastic.more_than(1, more, placed.is_set):
        assert not come.wait(3), "our workers are not at work yet, and might lose their place"
        placed.set()
        assert come.wait(30), "one place is ours, the other is free"
    come.clear()
    us = placement_group([{"CPU": 1}])
    assert us.wait(30)
    with elastic.more_than(1, more, placed.is_set):
        assert not come.wait(3), "both places are taken"
        remove_placement_group(somebody)
        assert come.wait(30), "the place of somebody else is free"
    (node,) = ray.nodes()
    assert joined == [node["NodeID"]] * 2

    spares = Spares(load_job(job), wanted=True)
    spares.prepare(joined, threading.Event())
    first, second = (process for process, _ in spares._waiting[node["NodeID"]])
    os.kill(ray.get(second.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    assert spares.take(node["NodeID"]) is first, "the second is dead"
    new = spares.take(node["NodeID"])
    assert new not in (first, second)
    ray.kill(first)
    ray.kill(new)
    spares.end()
    without = Spares(load_job(job), wanted=False)
    without.fill(joined)
    assert not without._waiting


if __name__ == "__main__":
    with ray_session(None, cpus=2):
        main(sys.argv[1])
    print("room ok")
