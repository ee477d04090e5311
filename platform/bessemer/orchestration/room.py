"""How many workers the cluster has room for: the largest allowed number now, and the missing ones when they come.

Ray Train's elastic policy takes any number of workers, and grows by killing the group. Ours takes the numbers that
divide the slices of a batch, lets the workers write a checkpoint before they are replaced by more, and gives up on
machines that do not come. What asks is a placement group: it is met as a whole or not at all, it counts what others
use, and an autoscaler sees it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bessemer.errors import MachineError
from bessemer.spec.job import JobSpec

__all__ = ["Room", "allowed_sizes"]

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
"""What a placement group gets that the machines which are there could meet: lost workers are still holding on to it."""


def allowed_sizes(job: JobSpec) -> list[int]:
    """Numbers of workers that the job may be trained by, the largest first."""
    return [n for n in range(job.resources.workers, job.least_workers - 1, -1) if job.slices % n == 0]


class Room:
    """The places of one run's workers in the cluster that this process has joined."""

    def __init__(self, job: JobSpec) -> None:
        resources = job.resources
        self._job = job
        self.each = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            self.each["GPU"] = resources.gpus_per_worker
        self._strategy = resources.placement.upper()
        self.sizes = allowed_sizes(job)

    @contextlib.contextmanager
    def taken(self, stop: Callable[[], bool], waiting: Callable[[str], None]) -> Iterator[Any]:
        """The largest allowed number of places that are free, as a placement group; waits for the smallest.

        Args:
            stop: whether somebody no longer wants to wait.
            waiting: told once, before it waits, what is missing.

        Yields:
            None if `stop` said so.

        Raises:
            MachineError: `resources.wait_s` are over.
        """
        began, told = time.monotonic(), False
        with contextlib.ExitStack() as asked:
            largest = asked.enter_context(self._asked_for(self.sizes[0]))  # stays: an autoscaler sees what is wanted
            while not stop():
                for size in self.sizes:
                    if size > self._most_ever():
                        continue
                    with self._asked_for(size) if size != self.sizes[0] else contextlib.nullcontext(largest) as group:
                        if group.wait(timeout_seconds=_ANSWER_SECONDS):
                            if group is not largest:
                                asked.close()
                            yield group
                            return
                if time.monotonic() - began > self._job.resources.wait_s:
                    raise MachineError(
                        f"{self._missing()}. Nothing came in {self._job.resources.wait_s:g} s (resources.wait_s): "
                        "start more nodes, lower resources.workers, resources.min_workers or what each worker takes, "
                        "or wait for what else runs there."
                    )
                if not told:
                    told = True
                    waiting(f"{self._missing()}; waiting up to {self._job.resources.wait_s:g} s for more")
                time.sleep(_LOOK_SECONDS)
            yield None

    @contextlib.contextmanager
    def more_than(
        self, size: int, come: Callable[[list[str], threading.Event], object], placed: Callable[[], bool]
    ) -> Iterator[None]:
        """Call `come` once, from a thread, when there is room for the next larger number of workers, meanwhile.

        Args:
            size: workers that are at work.
            come: called then, with the nodes of those who would join, and what is set when it is too late.
            placed: whether these are at work; before that, asking for more would take their places.
        """
        larger = [each for each in self.sizes if each > size]
        if not larger:
            yield
            return
        over = threading.Event()

        def wait() -> None:
            while not placed():
                if over.wait(_LOOK_SECONDS):
                    return
            # Ray's own errors at the end of a session must not end up on a person's screen.
            with contextlib.suppress(Exception), self._asked_for(larger[-1] - size) as group:
                while not over.is_set():
                    if group.wait(timeout_seconds=_LOOK_SECONDS):
                        come(list(self.nodes_of(group).values()), over)
                        over.wait()  # keeps the room until the workers have left theirs

        thread = threading.Thread(target=wait, name="room", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # it looks every second; after the session it must not call Ray any more

    @staticmethod
    def nodes_of(group: Any) -> dict[int, str]:
        """Where each bundle of a placement group is."""
        from ray.util import placement_group_table

        found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        return found

    @staticmethod
    def draining() -> set[str]:
        """Names of hosts that are about to be taken away: a spot instance, or `ray drain-node`."""
        import ray

        try:  # what Ray Train itself asks; there is no public name for it
            nodes = ray._private.state.state.get_draining_nodes()
        except Exception:
            return set()
        return {n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] in nodes}  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _asked_for(self, workers: int) -> Iterator[Any]:
        from ray.util import placement_group, remove_placement_group

        group = placement_group([self.each] * workers, strategy=self._strategy)
        try:
            yield group
        finally:
            remove_placement_group(group)

    def _nodes(self) -> list[dict[str, float]]:
        """What each living node has, used or not."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]

    def _most_ever(self) -> int:
        """Workers that the nodes could hold if nothing else ran there."""
        return sum(int(min(node.get(kind, 0.0) / n + 1e-9 for kind, n in self.each.items())) for node in self._nodes())

    def _missing(self) -> str:
        each = " and ".join(f"{need:g} {kind}" for kind, need in self.each.items())
        nodes = self._nodes()
        there = ", ".join(f"{sum(node.get(kind, 0.0) for node in nodes):g} {kind}" for kind in self.each)
        import ray

        free_now = ray.available_resources()  # type: ignore[no-untyped-call]
        free = ", ".join(f"{free_now.get(kind, 0.0):g}" for kind in self.each)
        return (
            f"resources: {self.sizes[-1]} worker(s) with {each} each are asked for, and the {len(nodes)} node(s) of "
            f"the cluster have {there} together, of which {free} free"
        )
