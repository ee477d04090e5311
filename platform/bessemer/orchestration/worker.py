"""One worker of a run: puts system, data, engines and evaluation together, and trains.

Ray starts it (:mod:`bessemer.orchestration.launch`), or torchrun, which needs neither Ray nor MLflow::

    torchrun --standalone --nproc-per-node 2 -m bessemer.orchestration.worker jobs/quickstart.yaml --run-dir runs/mine
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bessemer.data.fields import Kind
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.opening import open_job_data
from bessemer.data.reading.quarantine import Quarantine
from bessemer.data.reading.stream import SliceStream
from bessemer.errors import BessemerError, SpecError
from bessemer.evaluation.grid import Sheet, columns_of
from bessemer.evaluation.names import CLIP_KINDS, parse_metric, split_metrics
from bessemer.evaluation.paths import check_walkable
from bessemer.evaluation.targets import check_targets
from bessemer.orchestration.backlog import Backlog
from bessemer.orchestration.elsewhere import restore_run
from bessemer.orchestration.evaluation import EvaluationBeside, EvaluationInTraining, Judge, held_out_images
from bessemer.orchestration.export import ema_profile
from bessemer.orchestration.failures import leave_failure
from bessemer.orchestration.logs import log_to_file
from bessemer.orchestration.preflight import with_absolute_paths
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.spec.load import load_job
from bessemer.systems.contract import Batch, Clock, System
from bessemer.systems.likelihood import LikelihoodSystem
from bessemer.systems.registry import build, check_data
from bessemer.systems.snapshot import SnapshotInfo
from bessemer.tracking.alerts import AlertWatch
from bessemer.tracking.journal import Journal, read_journal
from bessemer.tracking.runs import metric_scores
from bessemer.training.allocator import keep_freed_memory
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.checks import check_training
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.ema_store import EmaStore
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer, owned_slices
from bessemer.training.node import NodeReadings, all_nodes
from bessemer.training.peers import watch_peers
from bessemer.training.rng import generator
from bessemer.training.stopping import EXIT_STOPPED, StopRequest

__all__ = ["check_job", "run_worker"]

_log = logging.getLogger("bessemer.orchestration.worker")  # under torchrun, __name__ is __main__


def check_job(job: JobSpec) -> System:
    """Check everything of a job that needs the data set and the system; return the system, with weights unset.

    Raises:
        BessemerError: names the field, the value, the rule and the fix.
    """
    with open_job_data(job.data) as dataset:
        with torch.device("meta"):
            system = build(job.system.name, job.system.preset, job.system.config, dataset.manifest.facts)
        check_data(system, {field.name: field.shape for field in dataset.manifest.batch_fields}, job.data.path)
        if job.data.mirror and not dataset.manifest.batch_fields[0].is_picture:
            raise SpecError(f"data.mirror: true flips pictures, and {job.data.path} holds none; set it to false.")
        if len(dataset) < job.training.batch_size:
            raise SpecError(
                f"training.batch_size: {job.training.batch_size} is more than the {len(dataset)} images of "
                f"{job.data.path}; lower it."
            )
        with held_out_images(job, dataset):
            pass
        _check_metrics(job, system, dataset.manifest.kind)
    _check_held_out(job, system)
    if system.given and job.ema.batch_norm == "recomputed":
        raise SpecError(
            f"ema.batch_norm: recomputed takes statistics of samples drawn from noise, and {system.name} makes them "
            "from inputs; set it to copied."
        )
    check_training(job.training, system)
    return system


def _check_metrics(job: JobSpec, system: System, kind: Kind) -> None:
    """Refuse metrics that the system or its kind of data cannot have."""
    compared, likelihoods, targets = split_metrics(job.evaluation.metrics)
    made = "images" if kind in ("pairs", "domains") else kind
    for name in compared:
        metric = parse_metric(name)
        what = "clips" if metric.kind in CLIP_KINDS else "images"
        if what != made:
            fix = (
                f"use fdframes_{metric.extractor} or fdsteps_{metric.extractor}" if kind == "clips" else "leave it out"
            )
            raise SpecError(f"evaluation.metrics: {name} compares {what}, and {job.data.path} is of {kind}; {fix}.")
        if metric.is_path:
            check_walkable(system, name)
    if likelihoods and not isinstance(system, LikelihoodSystem):
        raise SpecError(
            f"evaluation.metrics: {', '.join(likelihoods)} needs a likelihood, and {system.name} has none; use metrics "
            "of its samples, such as kid_efflite0."
        )
    for name in targets:
        check_targets(system, name)


def _check_held_out(job: JobSpec, system: System) -> None:
    """A set that nothing reads is a mistake."""
    asks = any(metric.startswith(("bits_per_dim", "cas_", "cas-")) for metric in job.evaluation.metrics)
    if job.evaluation.held_out is not None and not asks and not system.given:
        raise SpecError(
            f"evaluation.held_out: {job.evaluation.held_out} has no effect while evaluation.metrics lacks bits_per_dim "
            f"and classification accuracies such as cas_efflite0, and {system.name} translates nothing; add one there, "
            "or remove the field."
        )


def run_worker(run_path: Path, until_kimg: float = float("inf"), *, sigterm: bool = False) -> bool:
    """Train the run as one of the workers that the environment describes, from its newest checkpoint to its end.

    A mistake that a person must fix is left in the run directory before it is raised, so that nobody tries again.

    Args:
        run_path: directory of the run.
        until_kimg: stop here already, with an evaluation and a checkpoint; another call goes on.
        sigterm: take SIGTERM as a request to stop. Not in processes of Ray: it sends it when a node is at its end, and
            the run is to go on elsewhere.

    Returns:
        False if the workers were asked to stop before the end, by SIGTERM or by :meth:`RunDirectory.request_stop`.
        They have written a checkpoint then.
    """
    run = RunDirectory.open(run_path)
    if run.error() is not None:
        return True
    try:
        return _train(run, until_kimg, sigterm)
    except BessemerError as e:
        run.leave_error(e)
        raise
    except Exception as e:
        _log.exception("this worker failed")
        leave_failure(run.failures, int(os.environ.get("RANK", "0")), e)
        raise


def _train(run: RunDirectory, until_kimg: float, sigterm: bool) -> bool:
    job = run.job()
    stop = StopRequest(run.stop_file, run.resize_file)
    if sigterm:
        stop.listen()
    torch.set_num_threads(job.training.threads_per_worker)
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    with join_workers() as workers, watch_peers(workers), open_job_data(job.data) as dataset:
        log_to_file(run, f"worker-{workers.rank}")
        if job.slices % workers.size:
            raise SpecError(
                f"workers: {workers.size} do not divide the {job.slices} slices of a batch "
                f"({job.training.batch_size} / {job.training.slice_size}); start as many as divide it."
            )
        _log.info("worker %d of %d, process %d", workers.rank, workers.size, os.getpid())
        init_deepspeed(workers.device)
        system = build(job.system.name, job.system.preset, job.system.config, dataset.manifest.facts)
        check_training(job.training, system)
        system.init_weights(generator("cpu", job.seed, "init"))
        _init_from_data(system, job, dataset, workers.device)
        engines = build_engines(
            system.networks(), system.optimizers(), job.training, workers, system.updates(Clock(0, 0))
        )
        emas = {name: ShardedEma(engines[name], job.ema, workers) for name in system.sampled_networks}
        slices = owned_slices(job.slices, workers.rank, workers.size)
        stream = SliceStream(
            dataset,
            seed=job.seed,
            batch_size=job.training.batch_size,
            slice_size=job.training.slice_size,
            slices=slices,
            node_slices=_node_slices(job, workers),
            mirror=job.data.mirror,
            threads=job.data.threads,
            cache=job.data.cache,
            pinned=workers.device.type == "cuda",
        )
        journal, readings = run.journal, NodeReadings()

        def write(kind: str, nimg: int, **fields: Any) -> None:
            if kind == "metrics":
                fields["values"] |= all_nodes(readings, workers)
            if kind == "metrics" and dataset.quarantine is not None:
                fields["values"]["data/bad_samples"] = _write_bad_samples(journal, nimg, dataset.quarantine, workers)
            if workers.is_first:
                journal.write(kind, nimg, **fields)

        info = SnapshotInfo(
            system=job.system.name,
            config=system.config.model_dump(mode="json"),
            nimg=0,
            ema=ema_profile(job.ema),
            seed=job.seed,
            data_hash=dataset.manifest.hash,
            class_names=list(dataset.manifest.sampled_classes),
            class_counts=list(dataset.manifest.sampled_classes.values()),
        )
        identity = Identity(
            system=job.system.name,
            config=system.config.model_dump(mode="json"),
            seed=job.seed,
            batch_size=job.training.batch_size,
            slice_size=job.training.slice_size,
            data_hash=dataset.manifest.hash,
        )
        if workers.is_first and not (run.path / "samples" / "real.png").exists():
            columns = columns_of({one.name: one.shape for one in dataset.fields}, job.evaluation.grid)
            ids = stream.order.ids(0, 0, job.evaluation.grid * columns) % len(dataset)
            Sheet(dataset.read_fields(ids), columns, dataset.fields[0].rate).save(run.path / "samples" / "real.png")

        backlog = Backlog(journal.path)

        def scores() -> dict[int, float]:
            return metric_scores(run.path, job.checkpoint.keep_best)

        def undecided() -> list[int]:
            return [p.nimg for p in backlog.read()[-job.evaluation.backlog :]]

        hosts = workers.gather(socket.gethostname())
        write("event", 0, event="placed", hosts={host: hosts.count(host) for host in sorted(set(hosts))})
        parts = (run, job, system, workers, write, info)
        evaluation: EvaluationBeside | EvaluationInTraining = (
            EvaluationBeside(*parts)
            if job.evaluation.beside
            else EvaluationInTraining(Judge(run, job, dataset, workers, write), *parts)
        )
        uploads = run.uploads(scores, undecided) if workers.is_first else None
        trainer = Trainer(
            job,
            system,
            engines,
            emas,
            stream,
            CheckpointStore(run.checkpoints, job.checkpoint, workers, scores, undecided, evaluation.finish, uploads),
            identity,
            workers,
            write,
            evaluation,
            EmaStore(run.path / "ema", job.ema.profiles, info, workers) if job.ema.profiles else None,
            stop,
        )
        try:
            begun = any(r["kind"] != "event" for r in read_journal(journal.path))
            if not trainer.resume() and begun:
                write("event", 0, event="resumed", checkpoint=None, workers=workers.size)
            finished = trainer.run(until_kimg)
            evaluation.finish()
            if finished and until_kimg >= job.training.total_kimg:
                write("event", trainer.clock.nimg, event="finished", workers=workers.size)
            return finished
        finally:
            stream.close()


def _init_from_data(system: System, job: JobSpec, dataset: ShardedDataset, device: torch.device) -> None:
    """Let a system that needs it see the first images of the run, which every worker reads for itself."""
    if not system.init_images:
        return
    size = job.training.slice_size
    slices = range(min(job.slices, -(-system.init_images // size)))
    stream = SliceStream(
        dataset, seed=job.seed, batch_size=job.training.batch_size, slice_size=size, slices=slices,
        mirror=job.data.mirror, threads=0, cache="none",
    )  # fmt: skip
    batches = [batch.to(device) for batch in stream.batch(0)]
    stream.close()
    for network in system.networks().values():
        network.to(device)
    labels = torch.cat([batch.labels for batch in batches])[: system.init_images]
    fields = {name: torch.cat([b[name] for b in batches])[: system.init_images] for name in batches[0].names}
    first = Batch(None, labels, **fields)
    system.init_from_data(first, generator(device, job.seed, "init from data"))


def _node_slices(job: JobSpec, workers: Workers) -> list[int]:
    """Slices that the workers on this machine own together. Collective."""
    host = socket.gethostname()
    ranks = [rank for rank, other in enumerate(workers.gather(host)) if other == host]
    return sorted(index for rank in ranks for index in owned_slices(job.slices, rank, workers.size))


def _write_bad_samples(journal: Journal, nimg: int, quarantine: Quarantine, workers: Workers) -> int:
    """Write an event for each damaged sample that a worker found since the last call, and count all. Collective."""
    found = workers.gather((len(quarantine), [asdict(sample) for sample in quarantine.take_new()]))
    if workers.is_first:
        for rank, (_, samples) in enumerate(found):
            for sample in samples:
                journal.write("event", nimg, event="bad_sample", worker=rank, **sample)
    return sum(count for count, _ in found)


def main() -> int:
    """Entry point for torchrun; returns the exit code.

    0 at the end of the run, 2 after a mistake that a person must fix, 75 when SIGTERM stopped it: start it again.
    """
    parser = argparse.ArgumentParser(description="Train as one worker under torchrun, without Ray and MLflow.")
    parser.add_argument("job", type=Path, help="job file; ignored when the run directory exists already")
    parser.add_argument("--run-dir", type=Path, required=True, help="directory of the run; resumed if it exists")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the job")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    try:
        with join_workers() as workers:
            if workers.is_first and not options.run_dir.exists():
                job = with_absolute_paths(load_job(options.job, options.set))
                check_job(job)
                run = restore_run(job, options.run_dir) or RunDirectory.create(
                    options.run_dir.parent, job, options.run_dir
                )
                run.journal.write("event", 0, event="started", workers=workers.size)
            workers.barrier()
            run = RunDirectory.open(options.run_dir)
            if workers.is_first:
                run.clear_error()
                run.clear_stop()
            workers.barrier()
            alerts = AlertWatch(run.path, run.job().alerts)
            if workers.is_first:
                alerts.start()
            try:
                return 0 if run_worker(run.path, sigterm=True) else EXIT_STOPPED
            finally:
                alerts.stop()
    except BessemerError as e:
        if rank == 0:
            print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main())
