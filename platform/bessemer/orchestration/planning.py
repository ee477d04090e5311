"""Plans of jobs: the system, its data set, and the memory of this machine, put together."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from bessemer.data.manifest import MANIFEST
from bessemer.data.reading.opening import load_job_manifest
from bessemer.data.reading.stream import CACHE_LIMIT
from bessemer.orchestration.evaluation_costs import evaluation_cost
from bessemer.spec.job import JobSpec
from bessemer.stores.opening import is_remote
from bessemer.systems.contract import System
from bessemer.systems.registry import build
from bessemer.training.checks import check_training
from bessemer.training.plan import Plan, Target, check_fits, make_plan, target

__all__ = ["check_memory", "plan_job"]


def plan_job(job: JobSpec, on: Target, efficiency: float = 0.35) -> tuple[Plan, list[str]]:
    """The plan of a job, and notes on what it does not know.

    Where the data set is not here, the job is planned by the preset's own shape.

    Raises:
        BessemerError: the job's system or data set is wrong.
    """
    path, facts, note, decoded = job.data.path, {}, None, 0
    if is_remote(path) or (Path(path) / MANIFEST).exists():
        manifest = load_job_manifest(job.data)
        facts = manifest.facts
        decoded = manifest.decoded_bytes
    else:
        note = f"data.path: {path} is not here, so shape and classes are taken from the preset and system.config"
    if job.data.cache == "none" or (job.data.cache == "auto" and decoded >= CACHE_LIMIT):
        decoded = 0

    def build_system() -> System:
        return build(job.system.name, job.system.preset, job.system.config, facts)

    with torch.device("meta"):
        check_training(job.training, build_system())
    cost = evaluation_cost(job.evaluation, build_system, host=on.host)
    notes = [] if note is None else [note]
    if cost.uncounted:
        notes.append(f"evaluation.metrics: the memory for {', '.join(cost.uncounted)} is not known here, and left out")
    made = make_plan(
        job,
        build_system,
        on,
        efficiency=efficiency,
        decoded_bytes=decoded,
        extractors=cost.extractors,
        evaluation=cost.moment,
    )
    return made, notes


def _this_machine(job: JobSpec) -> Target:
    if not job.resources.gpus_per_worker:
        return target("cpu", job)
    gpu = torch.cuda.get_device_properties(0)
    share = min(1.0, job.resources.gpus_per_worker)
    return Target(gpu.name, int(gpu.total_memory * share), 1.0, False)  # the speed is not asked for


def check_memory(job: JobSpec, on: Target | None = None) -> None:
    """Refuse a job that its devices cannot hold.

    Args:
        job: passed all other checks.
        on: device of each worker; None for those of this machine, as it is now.

    Raises:
        MachineError: names the largest part and the field to change.
    """
    on = on or _this_machine(job)
    if on.memory is None:
        return
    try:
        made, _ = plan_job(job, on)
    except Exception:  # a forecast that fails says nothing about the job, which has passed all other checks
        logging.getLogger(__name__).exception("the memory of %s could not be planned", job.name)
        return
    check_fits(made, job, lambda changed: plan_job(changed, on)[0])
