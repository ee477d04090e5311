"""Rules of a job that span several fields, or that a type cannot say.

They need nothing but the job itself. What needs more (the registry of systems, the data set's manifest, known
extractors, devices) is checked before a run starts by the module that owns the knowledge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bessemer.errors import StoreError
from bessemer.stores.opening import open_store

if TYPE_CHECKING:
    from bessemer.spec.job import JobSpec, LrScheduleSpec

__all__ = ["check_job"]

_METRIC = re.compile(r"[a-z][a-z0-9-]*_[a-z][a-z0-9_-]*")


def check_job(job: JobSpec) -> None:
    """Check every rule and report all that are broken.

    Raises:
        ValueError: one line per broken rule, each as ``field.path: value, rule, fix``.
    """
    rules = (
        _data_rules,
        _batch_rules,
        _elastic_rules,
        _gpu_rules,
        _length_rules,
        _precision_rules,
        _offload_rules,
        _rate_rules,
        _ema_rules,
        _optimizer_rules,
        _metric_rules,
        _keep_rules,
        _upload_rules,
        _alert_rules,
    )
    broken = [line for rule in rules for line in rule(job)]
    if broken:
        raise ValueError("\n".join(broken))


def _nearest(value: int, candidates: list[int]) -> str:
    below = [c for c in candidates if c < value][-1:]
    above = [c for c in candidates if c > value][:1]
    return " or ".join(str(c) for c in below + above)


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _multiples(unit: int, value: int) -> list[int]:
    below = value // unit * unit
    return [m for m in (below, below + unit) if m > 0]


def _data_rules(job: JobSpec) -> Iterator[str]:
    path = job.data.path
    if not path.startswith("pipe:"):
        return
    if not job.data.allow_pipe:
        yield (
            f"data.path: {path!r} runs a shell command on every worker; give the address of the data itself, "
            "or set data.allow_pipe to true if you wrote the command."
        )
    if "{name}" not in path:
        yield f"data.path: {path!r} does not say which file it reads; write {{name}} where the file's name belongs."


def _batch_rules(job: JobSpec) -> Iterator[str]:
    batch, piece, workers = job.training.batch_size, job.training.slice_size, job.resources.workers
    if batch % piece:
        fixes = [f"set training.batch_size to {_nearest(batch, _multiples(piece, batch))}"]
        if piece < batch:
            fixes.append(f"training.slice_size to {_nearest(piece, _divisors(batch))}")
        yield (
            f"training.batch_size: {batch} is not a multiple of training.slice_size {piece}, "
            f"and slices are never split; {', or '.join(fixes)}."
        )
    elif (slices := batch // piece) % workers:
        yield (
            f"resources.workers: {workers} does not divide the {slices} slices of a batch "
            f"(training.batch_size {batch} / training.slice_size {piece}), and workers own whole slices; "
            f"set resources.workers to {_nearest(workers, _divisors(slices))}, "
            f"or training.batch_size to {_nearest(batch, _multiples(piece * workers, batch))}."
        )


def _elastic_rules(job: JobSpec) -> Iterator[str]:
    most, least = job.resources.workers, job.resources.min_workers
    if least is None or job.training.batch_size % job.training.slice_size:
        return
    if least > most:
        yield (
            f"resources.min_workers: {least} is more than resources.workers {most}; lower it, or remove it to train "
            "with that many only."
        )
    elif job.slices % least:
        allowed = [size for size in _divisors(job.slices) if size <= most]
        yield (
            f"resources.min_workers: {least} does not divide the {job.slices} slices of a batch, and workers own whole "
            f"slices; set it to {_nearest(least, allowed)}."
        )
    elif least < most and job.training.batch_statistics == "workers":
        yield (
            f"resources.min_workers: {least} would change the run on the way, since training.batch_statistics: workers "
            "makes it depend on the number of workers; remove the field, or set training.batch_statistics to slice."
        )


def _gpu_rules(job: JobSpec) -> Iterator[str]:
    gpus, workers = job.resources.gpus_per_worker, job.resources.workers
    if gpus > 1:
        yield (
            f"resources.gpus_per_worker: {gpus:g} reserves GPUs that nobody uses, since a worker computes on one; "
            "set it to 1, and raise resources.workers."
        )
    elif 0 < gpus < 1 and workers > 1:
        yield (
            f"resources.gpus_per_worker: {gpus:g} would let some of {workers} workers share a GPU, and NCCL takes "
            "one worker per GPU; set it to 1, or resources.workers to 1."
        )


def _length_rules(job: JobSpec) -> Iterator[str]:
    batch = job.training.batch_size
    if job.training.total_kimg * 1000 < batch:
        yield (
            f"training.total_kimg: {job.training.total_kimg:g} is less than one batch of {batch} images; "
            f"set it to {batch / 1000:g} or more."
        )
    distances = [
        ("checkpoint.every_kimg", job.checkpoint.every_kimg),
        ("evaluation.every_kimg", job.evaluation.every_kimg),
    ]
    if job.ema.profiles:
        distances.append(("ema.store_every_kimg", job.ema.store_every_kimg))
    for field, every in distances:
        if every * 1000 < batch:
            yield (
                f"{field}: {every:g} is less than one batch of {batch} images, after which the run could "
                f"stop for it at the earliest; set it to {batch / 1000:g} or more."
            )


def _ema_rules(job: JobSpec) -> Iterator[str]:
    names = [f"{sigma_rel:g}" for sigma_rel in job.ema.profiles]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"ema.profiles: {name} is listed {names.count(name)} times; list it once."


def _precision_rules(job: JobSpec) -> Iterator[str]:
    if job.training.precision != "fp16":
        return
    if job.resources.gpus_per_worker == 0:
        yield (
            "training.precision: fp16 takes 15 times as long as fp32 on the CPU (resources.gpus_per_worker 0); "
            "set it to bf16 or fp32, or resources.gpus_per_worker to 1."
        )
    if job.training.sanitize_gradients:
        yield (
            "training.sanitize_gradients: true would hide from fp16's loss scaling that a gradient overflowed; "
            "set it to false, or training.precision to bf16."
        )


def _offload_rules(job: JobSpec) -> Iterator[str]:
    offload = job.training.offload
    if offload == "none":
        return
    if job.training.zero_stage == 0:
        yield (
            f"training.offload: {offload} is done by ZeRO, and training.zero_stage 0 is without it; set "
            "training.zero_stage to 1 or 2, or training.offload to none."
        )
    if job.resources.gpus_per_worker == 0:
        yield (
            f"training.offload: {offload} empties a GPU's memory, and on the CPU (resources.gpus_per_worker 0) "
            "everything is in the host's memory already; set it to none, or resources.gpus_per_worker to 1."
        )


def _rate_rules(job: JobSpec) -> Iterator[str]:
    training = job.training
    if (warmup := training.lr_schedule.warmup_kimg) >= training.total_kimg:
        yield (
            f"training.lr_schedule.warmup_kimg: {warmup:g} is not less than training.total_kimg "
            f"{training.total_kimg:g}, so the run would end before its warm-up; lower it."
        )
    yield from _decay_rules(training.lr_schedule, training.total_kimg)
    if training.lr_scaling != "none" and training.lr_reference_batch is None:
        yield (
            f"training.lr_reference_batch: is not set, but training.lr_scaling {training.lr_scaling} multiplies "
            "learning rates by a function of batch_size / lr_reference_batch; set it to the batch size that the "
            "learning rates were chosen for."
        )
    if training.lr_scaling == "none" and training.lr_reference_batch is not None:
        yield (
            f"training.lr_reference_batch: {training.lr_reference_batch} has no effect while training.lr_scaling is "
            "none; set training.lr_scaling to linear or sqrt, or remove the field."
        )


def _decay_rules(schedule: LrScheduleSpec, total_kimg: float) -> Iterator[str]:
    if (start := schedule.decay_from_kimg) is None:
        return
    if schedule.decay == "none":
        yield (
            f"training.lr_schedule.decay_from_kimg: {start:g} has no effect while training.lr_schedule.decay is none; "
            "set that to linear or cosine, or remove the field."
        )
    if not schedule.warmup_kimg <= start < total_kimg:
        yield (
            f"training.lr_schedule.decay_from_kimg: {start:g} does not lie between the end of the warm-up "
            f"({schedule.warmup_kimg:g}) and training.total_kimg ({total_kimg:g}); move it there, or remove it."
        )


def _optimizer_rules(job: JobSpec) -> Iterator[str]:
    clip, skip = job.training.gradient_clipping, job.training.skip_gradient_norm
    if clip is not None and skip is not None and skip < clip:
        yield (
            f"training.skip_gradient_norm: {skip:g} is less than training.gradient_clipping {clip:g}, so that no step "
            "would ever be clipped; set it to a larger norm, or remove one of them."
        )
    for network, optimizer in job.training.optimizers.items():
        for index, beta in enumerate(optimizer.betas or ()):
            if not 0 <= beta < 1:
                yield (
                    f"training.optimizers.{network}.betas: {list(optimizer.betas or ())} breaks "
                    f"0 <= beta < 1 at position {index + 1}; 0.9 and 0.999 are usual."
                )


def _metric_rules(job: JobSpec) -> Iterator[str]:
    metrics = job.evaluation.metrics
    for metric in metrics:
        kind, _, extractor = metric.partition("_")
        if metric in ("fid", "bits_per_dim", "l1", "psnr", "ssim"):
            continue
        if metric in ("samples_per_s", "latency_ms"):
            yield (
                f"evaluation.metrics: {metric!r} says nothing while a run trains on the same machine; leave it out, "
                f"and run `bessemer evaluate RUN -m {metric}` afterwards."
            )
            continue
        if kind == "fid":
            yield (
                f"evaluation.metrics: {metric!r} is not allowed, because fid means the Inception network "
                f"of 2015-12-05 and nothing else; write 'fid', or 'fd_{extractor}' for another extractor."
            )
        elif not _METRIC.fullmatch(metric):
            yield (
                f"evaluation.metrics: {metric!r} does not name its feature extractor; "
                f"write '<kind>_<extractor>', such as 'kid_efflite0' or 'fd_efflite0', or 'fid'."
            )
    yield from _likelihood_rules(job)
    for metric in sorted({m for m in metrics if metrics.count(m) > 1}):
        yield f"evaluation.metrics: {metric!r} is listed {metrics.count(metric)} times; list it once."
    evaluation = job.evaluation
    for field in ("stop_after_kimg", "rollback_at"):
        if getattr(evaluation, field) is not None and not metrics:
            yield (
                f"evaluation.{field}: {getattr(evaluation, field):g} judges the first of evaluation.metrics, which are "
                "none; name one, such as kid_efflite0, or remove the field."
            )
    if evaluation.rollback_at is not None and metrics and job.checkpoint.keep_best != metrics[0]:
        yield (
            f"evaluation.rollback_at: {evaluation.rollback_at:g} goes back to the best checkpoint by {metrics[0]}, but "
            f"checkpoint.keep_best is {job.checkpoint.keep_best or 'unset'}; set that to {metrics[0]}."
        )


def _likelihood_rules(job: JobSpec) -> Iterator[str]:
    evaluation = job.evaluation
    if "bits_per_dim" not in evaluation.metrics:
        if evaluation.importance_samples != 1:
            yield (
                f"evaluation.importance_samples: {evaluation.importance_samples} has no effect while "
                "evaluation.metrics lacks bits_per_dim; add it there, or remove the field."
            )
    elif job.ema.batch_norm == "recomputed":
        yield (
            "ema.batch_norm: recomputed takes BatchNorm statistics from generated images, and bits_per_dim needs those "
            "of real ones; set it to copied."
        )


def _keep_rules(job: JobSpec) -> Iterator[str]:
    keep, metric = job.checkpoint, job.checkpoint.keep_best
    if keep.keep_every_kimg is not None and keep.keep_every_kimg < keep.every_kimg:
        yield (
            f"checkpoint.keep_every_kimg: {keep.keep_every_kimg:g} is less than checkpoint.every_kimg "
            f"{keep.every_kimg:g}, so that every checkpoint would be kept; set it to a multiple of that."
        )
    if metric is None:
        return
    if metric not in job.evaluation.metrics:
        known = ", ".join(job.evaluation.metrics) or "none"
        yield (
            f"checkpoint.keep_best: {metric!r} is not among evaluation.metrics ({known}); "
            "name one of them, or add it there."
        )
    short, long = sorted((keep.every_kimg, job.evaluation.every_kimg))
    if abs(long / short - round(long / short)) > 1e-9:
        yield (
            f"checkpoint.keep_best: checkpoints come every {keep.every_kimg:g} kimg (checkpoint.every_kimg) and "
            f"evaluations every {job.evaluation.every_kimg:g} (evaluation.every_kimg), which rarely meet; "
            "make one a multiple of the other."
        )


def _alert_rules(job: JobSpec) -> Iterator[str]:
    stall = job.alerts.stall_kimg
    if stall is not None and not job.evaluation.metrics:
        yield (
            f"alerts.stall_kimg: {stall:g} judges the first of evaluation.metrics, which are none; name one, such as "
            "kid_efflite0, or remove the field."
        )
    elif stall is not None and stall < job.evaluation.every_kimg:
        yield (
            f"alerts.stall_kimg: {stall:g} is less than evaluation.every_kimg {job.evaluation.every_kimg:g}, so that "
            "every evaluation that is no better would be one; set it to a multiple of that."
        )


def _upload_rules(job: JobSpec) -> Iterator[str]:
    url = job.checkpoint.upload
    if url is None:
        return
    if url.startswith(("http://", "https://")):
        yield f"checkpoint.upload: {url} can only be read; name a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."
        return
    try:
        open_store(url)
    except StoreError as e:
        yield f"checkpoint.upload: {e}"
