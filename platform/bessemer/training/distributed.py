"""The group of workers: who am I, who else is there, and sums over all of us."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.errors import MachineError

__all__ = ["Workers", "end_process", "import_deepspeed", "init_deepspeed", "join_workers"]

T = TypeVar("T")

_LOOK_SECONDS = 1.0

COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""A worker that waits this long for another gives up; a killed peer is noticed at once."""


@dataclass(frozen=True)
class Workers:
    """This worker's place in the group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the workers, in place."""
        if self.size > 1:
            there = tensor.to(self.device)  # itself, unless it is offloaded: NCCL takes tensors of the GPU alone
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every worker's `value`, by rank, on every worker. Values are pickled: only for our own objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first worker's `value`, on every worker."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def await_first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on the first worker, on every worker, however long it takes. Collective."""
        if self.size == 1:
            return work()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work) if self.is_first else None
            # Many short collectives: a single one would time out in a worker that waits for a slow store.
            while not self.from_first(future is not None and bool(wait([future], _LOOK_SECONDS).done)):
                pass
            error = future.exception() if future is not None else None
            error = self.from_first(error)
            if error is not None:
                raise error
            result: T = self.from_first(future.result() if future is not None else None)
            return result

    def barrier(self) -> None:
        """Wait for everybody."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Join the process group that torchrun or Ray describes in the environment, or be the only worker.

    Raises:
        MachineError: the rendezvous port is taken.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # DeepSpeed insists on all of these, also for a single worker.
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    created = not dist.is_initialized()
    if created:
        backend = "nccl" if cuda else "gloo"
        try:
            if size == 1 and "MASTER_PORT" not in os.environ:
                os.environ["MASTER_PORT"] = "0"  # any free one: nobody else comes
                dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
            else:
                dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        except (RuntimeError, OSError) as e:
            if getattr(e, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in str(e):
                port = os.environ.get("MASTER_PORT")
                raise MachineError(
                    f"MASTER_PORT: port {port} on {os.environ['MASTER_ADDR']} is in use by another program; "
                    "choose a free one (torchrun --master-port PORT), or --standalone to have one chosen."
                ) from e
            raise
    try:
        yield Workers(rank=rank, size=size, device=device)
    finally:
        if created and dist.is_initialized():
            dist.destroy_process_group()


def import_deepspeed(device_type: str) -> None:
    """Import DeepSpeed for "cpu" or "cuda" devices without two things that it can do without: 3 of 9 s of CPU time.

    Its autotuner imports MLflow, which it takes for not installed where that fails. And its list of optimizers imports
    Muon, which asks for a compiled function and so loads all of inductor; no job can ask for Muon.
    """
    # Said, not found out: a process may have been given no GPUs yet.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        from deepspeed.runtime import compiler

        compile_ = compiler.compile
        compiler.compile = lambda *_, **__: lambda function: function
        try:
            with suppress(ImportError):  # other versions have it elsewhere: then it is only slower
                import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        finally:
            compiler.compile = compile_
    finally:
        if hidden:
            del sys.modules["mlflow"]


def init_deepspeed(device: torch.device) -> None:
    """Hand our process group to DeepSpeed.

    On the CPU, DeepSpeed would compile its shared-memory collectives at the first start (minutes, and a lock that
    hangs the next start if it is killed meanwhile). gloo does without: the ops are declared incompatible.
    """
    import_deepspeed(device.type)
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {**dict.fromkeys(ALL_OPS, False), "deepspeed_not_implemented": False}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False, verbose=False
        )


def end_process(code: int) -> NoReturn:
    """End a worker's process without finalising the interpreter.

    A thread of gloo lets go of a collective's tensors some time after the collective returned, and takes the GIL for
    it. If the interpreter is being finalised by then, that aborts the process, although all work is done: once in
    some fifty runs on a busy machine. Destroying the process group does not help while DeepSpeed refers to it.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
