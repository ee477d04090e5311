"""Asks a Ray of two cores for room, beside somebody else who takes one; a process of its own, since Ray stays in it."""

from __future__ import annotations

import sys
import threading

from bessemer.errors import MachineError
from bessemer.orchestration.launch import ray_session
from bessemer.orchestration.room import Room
from bessemer.spec.load import load_job

__all__: list[str] = []

TWO = ["resources.workers=2", "resources.cpus_per_worker=1"]


def refusal(room: Room, said: list[str]) -> str:
    try:
        found = room.find(lambda: False, said.append)
    except MachineError as e:
        return str(e)
    raise AssertionError(f"found room for {found}")


def main(job: str) -> None:
    from ray.util import placement_group, remove_placement_group

    fixed = Room(load_job(job, [*TWO, "resources.wait_s=0"]))
    elastic = Room(load_job(job, [*TWO, "resources.min_workers=1"]))
    said: list[str] = []
    assert fixed.find(lambda: False, said.append) == 2
    somebody = placement_group([{"CPU": 1}])
    assert somebody.wait(30)
    assert elastic.find(lambda: False, said.append) == 1
    text = refusal(fixed, said)
    assert "2 worker(s) with 1 CPU each are asked for" in text, text
    assert "have 2 CPU together, of which 1 free" in text, text
    text = refusal(Room(load_job(job, [*TWO, "resources.wait_s=0", "resources.gpus_per_worker=4"])), said)
    assert "2 worker(s) with 1 CPU and 4 GPU each" in text, text
    assert "have 2 CPU, 0 GPU together" in text, text
    assert said == []
    patient = Room(load_job(job, [*TWO, "resources.wait_s=60"]))
    assert patient.find(lambda: bool(said), said.append) is None, "nobody wanted to wait any more"
    assert "waiting up to 60 s" in said[0], said

    come, placed = threading.Event(), threading.Event()
    with elastic.more_than(1, come.set, placed.is_set):
        assert not come.wait(3), "our workers are not at work yet, and might lose their place"
        placed.set()
        assert come.wait(30), "one place is ours, the other is free"
    come.clear()
    us = placement_group([{"CPU": 1}])
    assert us.wait(30)
    with elastic.more_than(1, come.set, placed.is_set):
        assert not come.wait(3), "both places are taken"
        remove_placement_group(somebody)
        assert come.wait(30), "the place of somebody else is free"


if __name__ == "__main__":
    with ray_session(None, cpus=2):
        main(sys.argv[1])
    print("room ok")
