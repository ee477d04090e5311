"""`bessemer evaluate`: how good are the images of a run's newest snapshot?"""

from __future__ import annotations

from typing import Annotated

import typer

from bessemer.cli.locate import RunArgument, run_directory, snapshot_directory
from bessemer.evaluation.names import LIKELIHOODS, METRICS

__all__ = ["evaluate"]


def evaluate(
    run: RunArgument,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            "-m",
            help=f"One of {', '.join((*METRICS, *LIKELIHOODS))}; may be repeated. Default: those of the job.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=2, help="Images to generate. Default: that of the job.")
    ] = None,
    truncation: Annotated[
        float | None, typer.Option(min=0.001, help="Truncation of the latents. Default: that of the job.")
    ] = None,
    importance_samples: Annotated[
        int | None, typer.Option(min=1, help="Draws of the latents per image for bits_per_dim. Default: the job's.")
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Snapshot, such as kimg-000012.800. Default: the newest.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Packed data set to compare with. Default: that of the job.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. Default: a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Compare generated images with the data set, and write the result into the run's journal.

    Each number is kept with its protocol: extractor, sample count, reference, seed, truncation and weights. Metrics
    that end in _efflite0 work offline; fid and kid_inception need the Inception weights on this machine.
    """
    from bessemer.cli.output import echo_json, table
    from bessemer.evaluation.names import parse_metric, split_metrics
    from bessemer.orchestration.run_directory import RunDirectory

    directory = RunDirectory.open(run_directory(run))
    job = directory.job()
    names = [name for given in metrics or () for name in given.split(",")] or list(job.evaluation.metrics)
    names = list(dict.fromkeys(names)) or ["kid_efflite0", "fd_efflite0"]
    compared, likelihoods = split_metrics(names)
    for name in compared:
        parse_metric(name)
    place = snapshot_directory(directory.path, snapshot)

    import torch

    from bessemer.cli.output import progress
    from bessemer.data.dataset import ShardedDataset
    from bessemer.evaluation.evaluate import EvaluationRecord, evaluate_system
    from bessemer.evaluation.likelihood import LikelihoodRecord, evaluate_likelihood
    from bessemer.systems.snapshot import load_snapshot

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    system, info = load_snapshot(place, device)
    records: list[LikelihoodRecord | EvaluationRecord] = []
    with ShardedDataset.open(data or job.evaluation.held_out or job.data.path) as dataset, progress(place.name) as go:
        records += evaluate_likelihood(  # first: sampling renews BatchNorm statistics
            system,
            info,
            dataset,
            likelihoods,
            samples=samples or job.evaluation.samples,
            importance_samples=importance_samples or job.evaluation.importance_samples,
            seed=job.seed,
            device=device,
            progress=lambda _, done, total: go(done, total),
        )
    with ShardedDataset.open(data or job.data.path) as dataset, progress(place.name) as advance:
        records += evaluate_system(
            system,
            info,
            dataset,
            compared,
            samples=samples or job.evaluation.samples,
            batch_size=job.evaluation.batch_size,
            seed=job.seed,
            truncation=job.evaluation.truncation if truncation is None else truncation,
            device=device,
            progress=lambda _, done, total: advance(done, total),
        )
    for record in records:
        directory.journal.write("evaluation", info.nimg, **record.as_dict())
    if json:
        echo_json([{"nimg": info.nimg, **record.as_dict()} for record in records])
        return
    table(
        ("metric", "value", "standard error", "samples", "real images", "kimg", "seconds"),
        [
            (
                r.metric,
                r.value,
                r.standard_error,
                r.samples,
                r.samples if isinstance(r, LikelihoodRecord) else r.reference_samples,
                info.nimg / 1000,
                round(r.seconds, 1),
            )
            for r in records
        ],
    )
