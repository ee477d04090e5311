"""A group of worker processes on Ray, and spare ones that have done their imports before they are needed.

Ray Train would start three processes more for every group (controller, barrier, cleaner; 0.7 GB), and import pandas and
torch in them and in every new worker before it begins. What an attempt needs is less: places that are free together,
a process at each, and to hear at once when one is gone. So a group is made of actors. They take no resources; the
placement group holds what they use. That lets spare ones wait anywhere, and step in without a start of their own.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bessemer.orchestration.heartbeat import Heartbeats, Point, reach_all, serve_at, serve_heartbeat
from bessemer.orchestration.room import Room
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec

__all__ = ["Spares", "WorkersLost", "environments", "train_with_workers"]

_START_SECONDS = 300.0
"""For a process to start and import torch, on a machine however busy. That its host dies is known much sooner."""
_LOOK_SECONDS = 5.0
_SILENT_LOOKS = 12
"""For a process that hangs. Other workers notice it in a third of this minute, unless it is alone or all hang."""
_OTHERS_SECONDS = 2.0
"""For the others to fail too after the first, so that whose fault it was is known."""


class WorkersLost(Exception):  # noqa: N818
    """Workers failed, were killed, or went away with their host."""

    def __init__(self, failures: Mapping[int, BaseException], why: str = "") -> None:
        super().__init__(why)
        self.failures = failures
        """Rank -> what Ray says of it."""


class TrainWorker:
    """The process of a worker: imports at once, trains when it is told.

    It trains in the only thread that Ray lets an actor have (see :mod:`bessemer.orchestration.heartbeat`), and answers
    nothing meanwhile.
    """

    def __init__(self, gpus: float) -> None:
        import bessemer.orchestration.worker  # noqa: F401

        # Which GPUs are this worker's is known later, and a process that has asked CUDA for its devices keeps those it
        # saw: what may ask, DeepSpeed and the compiler, has to wait.
        if not gpus:
            from bessemer.training.distributed import import_deepspeed

            import_deepspeed("cpu")
            import torch._dynamo  # noqa: F401  # which the first optimizer imports

        import ray

        self._address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._heartbeat = serve_heartbeat(self._address)
        self._store: Any = None
        self._listening: socket.socket | None = None

    def answer(self) -> Point:
        """Where this process is heard from now on, having imported everything."""
        return self._heartbeat

    def listen(self) -> Point:
        """Where gloo would make this process listen, on a free port; connections are accepted from now on."""
        from bessemer.orchestration.nodes import gloo_address

        address = gloo_address()
        self._listening = serve_at(address)
        return address, self._listening.getsockname()[1]

    def unreached(self, points: Mapping[int, Point]) -> dict[int, str]:
        """Rank -> why this process does not reach it, of those who listen at `points`."""
        reached, unreached = reach_all(points)
        for connection in reached.values():
            connection.close()
        return unreached

    def meeting_point(self) -> Point:
        """Where the key-value store is by which the group finds itself; served from now on."""
        from torch._C._distributed_c10d import TCPStore

        self._store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
        return self._address, self._store.port

    def train(self, run: str, environment: dict[str, str]) -> None:
        """Train as the worker that `environment` describes, in the words of torchrun."""
        os.environ.update(environment)
        if self._listening is not None:
            self._listening.close()
        from bessemer.orchestration.worker import run_worker

        run_worker(Path(run))


class Spares:
    """Processes that wait on the nodes of a run to become workers.

    Args:
        job: the job.
        wanted: whether there shall be any; without, processes are started when they are needed.
    """

    def __init__(self, job: JobSpec, wanted: bool) -> None:
        self._gpus, self._wanted = job.resources.gpus_per_worker, wanted
        self._waiting: dict[str, list[Any]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, node: str) -> Any:
        """A process on `node`: a spare one that answers, or a new one."""
        import ray

        while waiting := self._waiting[node]:
            process, ready = waiting.pop()
            try:
                if ray.wait([ready], timeout=0)[0]:  # else it still imports, and is nearer to its end than a new one
                    ray.get(process.answer.remote(), timeout=_OTHERS_SECONDS)
            except Exception:
                ray.kill(process)
            else:
                return process
        return self._start(node)

    def fill(self, nodes: Sequence[str]) -> None:
        """Let as many wait on each node as there are workers, which `nodes` names."""
        if not self._wanted:
            return
        with self._lock:
            for node, count in Counter(nodes).items():
                while len(self._waiting[node]) < count:
                    process = self._start(node)
                    self._waiting[node].append((process, process.answer.remote()))

    def prepare(self, nodes: Sequence[str], over: threading.Event) -> None:
        """As :meth:`fill`, but wait until they have imported everything, or until `over`."""
        import ray

        self.fill(nodes)
        ready = [ready for node in set(nodes) for _, ready in self._waiting[node]]
        while ready and not over.is_set():
            ready = ray.wait(ready, num_returns=len(ready), timeout=1.0)[1]

    def end(self) -> None:
        """End all that wait."""
        import ray

        for process, _ in (each for waiting in self._waiting.values() for each in waiting):
            ray.kill(process)
        self._waiting.clear()

    def _start(self, node: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return (
            ray.remote(TrainWorker)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._gpus)
        )


def train_with_workers(run: RunDirectory, places: Any, spares: Spares, saved: Callable[[], bool]) -> None:
    """Let a group of workers train until all of them end.

    Args:
        run: what they train.
        places: the placement group that holds a place for each.
        spares: where processes come from; filled as soon as there is something that they could go on from.
        saved: whether there is.

    Raises:
        WorkersLost: not all of them ended by themselves.
    """
    import ray

    workers: list[Any] = []
    trainings: dict[Any, int] = {}
    try:
        bundles, nodes = _in_order(places)
        gpus = _gpus_of(places, bundles)
        workers += [spares.take(node) for node in nodes]
        points = _collect({worker.answer.remote(): rank for rank, worker in enumerate(workers)}, _START_SECONDS)
        if len(set(nodes)) > 1:
            _check_paths(workers)
        with closing(_hear(points)) as heartbeats:
            address, port = ray.get(workers[0].meeting_point.remote(), timeout=_START_SECONDS)
            for rank, environment in enumerate(environments(nodes, gpus, address, port)):
                trainings[workers[rank].train.remote(str(run.path), environment)] = rank
            _watch(trainings, heartbeats, lambda: spares.fill(nodes if saved() else ()))
    except (ray.exceptions.RayError, TimeoutError) as e:
        raise WorkersLost({}, str(e)) from e
    finally:
        for worker in workers:
            ray.kill(worker)
        if trainings:  # what they held is free then
            ray.wait(list(trainings), num_returns=len(trainings), timeout=_OTHERS_SECONDS)


def _check_paths(workers: Sequence[Any]) -> None:
    """Let each worker connect to every other: what a firewall swallows would only look like a worker that hangs.

    Raises:
        WorkersLost: some do not reach others.
    """
    import ray

    points = dict(enumerate(ray.get([worker.listen.remote() for worker in workers], timeout=_START_SECONDS)))
    asked = [worker.unreached.remote(points) for worker in workers]
    failures: dict[int, BaseException] = {}
    for rank, unreached in enumerate(ray.get(asked, timeout=_START_SECONDS)):
        if unreached:
            others = ", ".join(f"worker {other} at {why}" for other, why in sorted(unreached.items()))
            failures[rank] = ConnectionError(
                f"does not reach {others}; let the nodes reach each other at all ports, or set GLOO_SOCKET_IFNAME"
            )
    if failures:
        raise WorkersLost(failures)


def _hear(points: Mapping[int, Point]) -> Heartbeats:
    """What is heard of the workers whose heartbeats are served at `points`.

    Raises:
        WorkersLost: this process does not reach some.
    """
    heartbeats = Heartbeats(points)
    if heartbeats.unreached:
        heartbeats.close()
        raise WorkersLost(
            {
                rank: ConnectionError(
                    f"the driver does not reach it at {why}; let the nodes reach each other at all ports"
                )
                for rank, why in heartbeats.unreached.items()
            }
        )
    return heartbeats


def environments(nodes: Sequence[str], gpus: Sequence[Sequence[str]], address: str, port: int) -> list[dict[str, str]]:
    """What each worker finds in its environment, by rank; as torchrun would put it.

    Args:
        nodes: where each worker is, those of one node next to each other.
        gpus: ids of the GPUs that each has.
        address: of the key-value store that is served there already.
        port: likewise.
    """
    found = []
    for rank, node in enumerate(nodes):
        mates = [other for other, there in enumerate(nodes) if there == node]
        # All see each other's GPUs, in the order of ranks: that is how NCCL copies directly from one to another.
        devices = list(dict.fromkeys(gpu for mate in mates for gpu in gpus[mate]))
        found.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "LOCAL_RANK": str(mates.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(mates)),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # it is served already, by nobody's rank
                "TORCHELASTIC_RESTART_COUNT": "0",
                "CUDA_VISIBLE_DEVICES": ",".join(devices),
            }
        )
    return found


def _in_order(places: Any) -> tuple[list[int], list[str]]:
    """Bundles of a placement group and their nodes, by rank: those of one node are next to each other."""
    where = Room.nodes_of(places)
    nodes = list(dict.fromkeys(where[bundle] for bundle in sorted(where)))
    bundles = sorted(where, key=lambda bundle: (nodes.index(where[bundle]), bundle))
    return bundles, [where[bundle] for bundle in bundles]


def _gpus_of(places: Any, bundles: Sequence[int]) -> list[list[str]]:
    """Ids of the GPUs that a placement group holds, for each bundle."""
    each = places.bundle_specs[0].get("GPU", 0.0)
    if not each:
        return [[] for _ in bundles]
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def ids() -> list[str]:
        return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    asked = [
        ray.remote(num_cpus=0, num_gpus=each, max_retries=0)(ids)
        .options(scheduling_strategy=PlacementGroupSchedulingStrategy(places, bundle))
        .remote()
        for bundle in bundles
    ]
    return list(ray.get(asked, timeout=_START_SECONDS))


def _watch(trainings: Mapping[Any, int], heartbeats: Heartbeats, look: Callable[[], object]) -> None:
    """Return when all workers have; `look` now and then.

    Raises:
        WorkersLost: one failed, is gone, or hangs.
    """
    import ray

    left = dict(trainings)
    while left:
        done, _ = ray.wait(list(left), timeout=_LOOK_SECONDS)
        for training in done:
            try:
                ray.get(training)
            except Exception:
                _collect(left, _OTHERS_SECONDS)  # raises
            del left[training]
        if not done:
            hung = {rank for rank, looks in heartbeats.look().items() if looks >= _SILENT_LOOKS} & set(left.values())
            if hung:
                why = f"its process hangs: nothing was heard of it for {_SILENT_LOOKS * _LOOK_SECONDS:g} s"
                raise WorkersLost({rank: TimeoutError(why) for rank in hung})
        look()


def _collect(futures: Mapping[Any, int], seconds: float) -> dict[int, Any]:
    """Rank -> what its one of `futures` says; all are waited for, but not longer than so.

    Raises:
        WorkersLost: some of them failed.
    """
    import ray

    # As soon as one has failed, the others get only as long as it takes to fail with it.
    end, left, said, failures = time.monotonic() + seconds, dict(futures), {}, {}
    while left and (remaining := end - time.monotonic()) > 0:
        done, _ = ray.wait(list(left), timeout=remaining)
        for future in done:
            rank = left.pop(future)
            try:
                said[rank] = ray.get(future)
            except Exception as e:
                failures[rank] = getattr(e, "cause", None) or e  # Ray's wrapper begins with its own traceback
                end = min(end, time.monotonic() + _OTHERS_SECONDS)
    if failures:
        raise WorkersLost(failures)
    if left:
        late = TimeoutError(f"not ready after {seconds:g} s")
        raise WorkersLost(dict.fromkeys(left.values(), late))
    return said
