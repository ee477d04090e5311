"""Everything about a job that can be checked before anything starts."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import uuid
from pathlib import Path
from typing import Any

from bessemer.errors import MachineError, SpecError, StoreError
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.stores.opening import is_url, open_store
from bessemer.stores.store import Patience

__all__ = ["cluster_address", "preflight", "with_absolute_paths"]

_ANSWER_SECONDS = 5.0


def with_absolute_paths(job: JobSpec) -> JobSpec:
    """The job with its paths made absolute: workers have other working directories."""
    paths = {} if is_url(job.data.path) else {"path": str(Path(job.data.path).absolute())}
    if job.data.cache_dir is not None:
        paths["cache_dir"] = str(Path(job.data.cache_dir).expanduser().absolute())
    update: dict[str, Any] = {"data": job.data.model_copy(update=paths)}
    if job.evaluation.held_out is not None and not is_url(job.evaluation.held_out):
        held_out = str(Path(job.evaluation.held_out).absolute())
        update["evaluation"] = job.evaluation.model_copy(update={"held_out": held_out})
    if job.checkpoint.upload is not None and not is_url(job.checkpoint.upload):
        upload = str(Path(job.checkpoint.upload).absolute())
        update["checkpoint"] = job.checkpoint.model_copy(update={"upload": upload})
    return job.model_copy(update=update)


def cluster_address(job: JobSpec) -> str | None:
    """The Ray cluster that the job joins: its own address or, as everywhere in Ray, that in RAY_ADDRESS."""
    return job.resources.address or os.environ.get("RAY_ADDRESS") or None


def preflight(job: JobSpec, runs_root: Path) -> None:
    """Check everything that can be checked before anything starts.

    Raises:
        BessemerError: names the field or file, the value, the rule and the fix.
    """
    from bessemer.evaluation.extractors import get_extractor
    from bessemer.evaluation.names import parse_metric, split_metrics
    from bessemer.orchestration.planning import check_memory
    from bessemer.orchestration.worker import check_job
    from bessemer.tracking.mlflow_store import check_uri

    RunDirectory.check_root(runs_root)
    check_job(job)
    compared = split_metrics(job.evaluation.metrics).compared
    for extractor in dict.fromkeys(parse_metric(name).extractor for name in compared):
        get_extractor(extractor)
    if job.checkpoint.upload is not None:
        _check_upload(job.checkpoint.upload)
    if job.tracking.mlflow:
        check_uri(job.tracking.uri, runs_root)
    address = cluster_address(job)
    if address is None:
        _check_this_machine(job)
        check_memory(job)
    else:
        _check_cluster(address)


def _check_upload(url: str) -> None:
    """Write an object there, read it back, delete it."""
    store = open_store(url, Patience(attempts=2, timeout=10.0))
    name = f"probe-{uuid.uuid4().hex}"
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(name.encode())
            file.flush()
            store.put(name, Path(file.name))
        if store.read(name) != name.encode():
            raise StoreError(f"{store.shown(name)}: does not read back as it was written; use another store.")
        store.delete(name)
    except (StoreError, MachineError) as e:
        raise type(e)(f"checkpoint.upload: {e}") from None


def _check_this_machine(job: JobSpec) -> None:
    import torch

    resources, evaluator = job.resources, job.evaluation.beside
    here = {"CPUs": len(os.sched_getaffinity(0)), "GPUs": torch.cuda.device_count()}
    for kind, each, beside, needed, less in (
        ("CPUs", resources.cpus_per_worker, resources.evaluator_cpus, job.cpus, ""),
        ("GPUs", resources.gpus_per_worker, resources.evaluator_gpus, job.gpus, " (0 trains on the CPU)"),
    ):
        if needed <= here[kind]:
            continue
        who = f"{resources.workers} workers with {each:g} {kind} each"
        fix = f"lower resources.workers or resources.{kind.lower()}_per_worker{less}"
        if evaluator:
            who += f" and an evaluator with {beside:g} (evaluation.beside)"
            fix += ", set evaluation.beside to false"
        raise MachineError(
            f"resources: {who} need {needed:g}, and this machine has {here[kind]}; {fix}, or name a cluster in "
            "resources.address."
        )


def _check_cluster(address: str) -> None:
    """Somebody must listen at `host:port` or `ray://host:port`; Ray itself finds `auto`."""
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/:\s]+|\[[^\]\s]+\]):(?P<port>\d{1,5})", address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise SpecError(
            f"resources.address or RAY_ADDRESS: {address!r} is no address of a Ray cluster; write HOST:PORT of "
            "its head (port 6379 unless it was chosen otherwise), or auto for the one that runs on this machine."
        )
    try:
        with socket.create_connection((match["host"].strip("[]"), int(match["port"])), _ANSWER_SECONDS) as connection:
            is_grpc = os.environ.get("RAY_USE_TLS") == "1" or _speaks_grpc(connection)
    except OSError as e:
        raise MachineError(
            f"resources.address or RAY_ADDRESS: nothing answers at {address} ({e.strerror or e}); check the address, "
            "or leave both out to start Ray on this machine."
        ) from None
    if not is_grpc:
        raise MachineError(
            f"resources.address or RAY_ADDRESS: something listens at {address}, but it is no Ray cluster; give the "
            "port that nodes join by, 6379 unless it was chosen otherwise (8265 is the dashboard, for submitting)."
        )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether an HTTP/2 server answers our preface with its settings (RFC 9113, section 3.4). Ray waits for minutes."""
    connection.settimeout(_ANSWER_SECONDS)
    empty_settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty_settings)
        frame = connection.recv(9, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(frame) == 9 and frame[3] == 4
