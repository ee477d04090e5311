"""Packs the shards of a data set on Ray: one task per shard, wherever a core of the cluster is free."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from bessemer.data.packing.pack import Runner
from bessemer.data.packing.shard_task import ShardResult, ShardTask
from bessemer.errors import BessemerError, MachineError
from bessemer.orchestration.launch import ray_session

__all__ = ["ray_runner"]


@contextmanager
def ray_runner(address: str, workers: int) -> Iterator[Runner]:
    """A runner for :func:`bessemer.data.packing.pack.pack`.

    Lost tasks are done again; their shards have the same bytes. Source and destination must lie on a file system that
    all nodes share.

    Args:
        address: of a running cluster, `auto` for the one that this machine belongs to, or `local` to start Ray here.
        workers: processes of a local Ray; a cluster uses all its cores.

    Raises:
        MachineError: no cluster answers there.
    """
    with ExitStack() as stack:
        try:
            _check_answer(address)
            stack.enter_context(ray_session(None if address == "local" else address, cpus=workers))
        except (MachineError, OSError) as error:
            raise MachineError(
                f"--ray {address}: no Ray cluster answers there; check the address and RAY_AUTH_TOKEN, or take --ray "
                f"local or --workers"
            ) from error
        yield _run


def _check_answer(address: str) -> None:
    """Fail at once where nothing listens: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _run(work: Callable[[ShardTask], ShardResult], tasks: Iterable[ShardTask]) -> Iterator[ShardResult]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    resources: Callable[[], dict[str, float]] = ray.cluster_resources
    # One thread per task: Ray counts cores, and shares them out by tasks.
    remote = ray.remote(num_cpus=1, max_retries=3)(work)
    most = max(2, 2 * int(resources().get("CPU", 1)))
    rest = iter(tasks)
    pending: list[Any] = []
    while True:
        pending += [remote.remote(task) for task in islice(rest, most - len(pending))]
        if not pending:
            return
        done, pending = ray.wait(pending)
        for future in done:
            try:
                result: ShardResult = ray.get(future)
            except RayTaskError as error:
                if isinstance(error.cause, BessemerError):
                    raise error.cause from None
                raise
            except RayError as error:
                raise MachineError(
                    f"Ray lost a task more than three times ({type(error).__name__}); give the same command again: it "
                    f"goes on where it stopped"
                ) from None
            yield result
