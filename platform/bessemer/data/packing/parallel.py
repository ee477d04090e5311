"""Work spread over processes of this machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from bessemer.errors import MachineError

__all__ = ["run_in_processes"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results of `work` on each task, as they come.

    Args:
        work: a function of a module.
        tasks: drawn when a process is free.
        workers: processes.

    Raises:
        MachineError: a process died.
    """
    rest = iter(tasks)
    # Threads of this process hold locks that a forked child would never see released.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        pending: set[Future[Result]] = set()
        try:
            while True:
                pending |= {pool.submit(work, task) for task in islice(rest, workers + 1 - len(pending))}
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise MachineError(
                "a worker process died, most often for lack of memory; give the same command again, with fewer "
                "--workers: it goes on where it stopped"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, so they watch for its end."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
