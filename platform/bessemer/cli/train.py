"""`bessemer train` and `bessemer resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.locate import run_directory

if TYPE_CHECKING:
    from bessemer.orchestration.provenance import Provenance
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.spec.job import JobSpec

__all__ = ["resume", "say_where", "train", "train_run"]

SubmissionOption = Annotated[
    Path | None,
    typer.Option(hidden=True, help="Directory with what `bessemer submit` sent along: where the run comes from."),
]


def train(
    job: Annotated[Path, typer.Argument(help="Job file (YAML); `bessemer schema` documents its fields.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field: --set training.total_kimg=20. Repeatable."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Directory that holds the runs.")] = Path("runs"),
    run_dir: Annotated[
        Path | None, typer.Option(help="Directory of this run; by default RUNS/<name of the job>.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job, the data and the machine, then stop.")
    ] = False,
    submission: SubmissionOption = None,
) -> None:
    """Train a job: check it, start its workers on Ray, and follow it to its end.

    Everything about the run lands in its directory: job, journal, checkpoints, snapshots, sample grids, report.
    Ctrl-C stops it; `bessemer resume RUN` goes on from the last checkpoint. After SIGTERM the workers write one
    first, and the exit code is 75.
    """
    from bessemer.orchestration.preflight import preflight, with_absolute_paths
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.spec.load import load_job

    spec = with_absolute_paths(load_job(job, set_ or ()))
    if submission is None:
        say_where(spec)
    preflight(spec, run_dir.parent if run_dir else runs)
    if dry_run:
        typer.echo(f"ok: {job} can be trained here with {spec.resources.workers} worker(s)")
        return
    provenance = _provenance(submission)
    train_run(RunDirectory.create(runs, spec, run_dir, provenance), provenance, submission is not None)


def resume(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Run directory, the run's name below runs/, or the URL to which it was uploaded."
        ),
    ],
    runs: Annotated[Path, typer.Option(help="Directory that holds the runs; used with a URL.")] = Path("runs"),
    submission: SubmissionOption = None,
) -> None:
    """Go on with an interrupted run from its newest undamaged checkpoint.

    A run whose machine was lost goes on from its uploads: bessemer resume s3://bucket/runs/mine.
    """
    from bessemer.errors import RunError
    from bessemer.orchestration.elsewhere import fetch_run
    from bessemer.orchestration.preflight import preflight
    from bessemer.orchestration.run_directory import RunDirectory
    from bessemer.stores.opening import is_url

    try:
        directory = fetch_run(run, runs) if is_url(run) else RunDirectory.open(run_directory(run))
    except RunError as e:
        if is_url(run) or Path(run).is_absolute():
            raise
        raise RunError(f"{e} A run on a cluster goes on with: bessemer submit --resume {run}") from None
    if submission is None:
        say_where(directory.job())
    preflight(directory.job(), directory.runs_root)
    provenance = _provenance(submission)
    directory.add_provenance(provenance)
    train_run(directory, provenance, submission is not None)


def say_where(job: JobSpec) -> None:
    """Say it when a job is trained on a cluster: RAY_ADDRESS may have been set long ago."""
    from bessemer.orchestration.preflight import cluster_address

    if (address := cluster_address(job)) is not None:
        source = "resources.address" if job.resources.address else "RAY_ADDRESS"
        typer.echo(f"joins the Ray cluster at {address} ({source}); unset it to train on this machine alone", err=True)


def _provenance(submission: Path | None) -> Provenance:
    from bessemer.orchestration.provenance import Provenance

    return Provenance.here() if submission is None else Provenance.read(submission)


def train_run(run: RunDirectory, provenance: Provenance | None = None, submitted: bool = False) -> None:
    """Train `run` to its end with a progress display, and say where its results are, or how it goes on."""
    from bessemer.cli.progress import follow_run
    from bessemer.orchestration.launch import Stopped, launch
    from bessemer.training.stopping import EXIT_STOPPED, STOPPED_LINE

    typer.echo(f"run {run.path}", err=True)
    for name, (here, there) in (provenance.differences_here() if provenance else {}).items():
        typer.echo(f"note: {name} is {here or 'missing'} here, {there or 'missing'} where it was submitted", err=True)
    try:
        launch(run, follow_run)
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with: bessemer resume {run.path}", err=True)
        raise typer.Exit(130) from None
    except Stopped:
        again = f"bessemer submit --resume {run.path.name}" if submitted else f"bessemer resume {run.path}"
        typer.echo(f"{STOPPED_LINE}; go on with: {again}", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    typer.echo(f"finished: {run.path}\nreport:   {run.path / 'report.html'}", err=True)
