"""The `bessemer` command: gathers the verbs, and prints errors that a person can fix without a traceback.

Every verb lives in a file of its own whose top imports nothing heavy, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bessemer.cli import (
    board,
    checkpoint,
    compare,
    data,
    doctor,
    ema,
    evaluate,
    extractors,
    mlflow_page,
    plan,
    project,
    quickstart,
    register,
    report,
    runs,
    sample,
    schema,
    search,
    status,
    submit,
    systems,
    train,
)
from bessemer.errors import BessemerError

__all__ = ["app", "run"]

_MOST_LINES = 30

app = typer.Typer(
    name="bessemer",
    help="Train generative models, from one machine to a cluster, and review what came out.",
    epilog="Begin with: bessemer quickstart. What this machine lacks: bessemer doctor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from bessemer import __version__

        typer.echo(f"bessemer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(short_help="Pack data, train a small BigGAN, show what came out.")(quickstart.quickstart)
app.command(short_help="Train a job.")(train.train)
app.command(short_help="Say what a job takes: memory, operations, time.")(plan.plan)
app.command(short_help="Go on with an interrupted run.")(train.resume)
app.command(short_help="Let a Ray cluster train a job.")(submit.submit)
app.command(short_help="List what was submitted to a cluster.")(submit.jobs)
app.command(short_help="Say how a run is, here or on a cluster.")(status.status)
app.command(short_help="Print what a submitted run prints.")(submit.logs)
app.command(short_help="Stop a submitted run, after a checkpoint.")(submit.stop)
app.command(short_help="List all runs.")(runs.runs)
app.command(short_help="Set runs side by side.")(compare.compare)
app.command(short_help="Rank runs, where they are comparable.")(compare.leaderboard)
app.command(short_help="Write a page of runs: samples, curves, provenance.")(report.report)
app.command(short_help="Serve a live page of all runs.")(board.board)
app.command(short_help="Put a run's weights into MLflow's model registry.")(register.register)
app.command(short_help="Draw a grid of images.")(sample.sample)
app.command(short_help="Find an image in the latent space of a StyleGAN2.")(project.project)
app.command(short_help="Compare generated images with real ones.")(evaluate.evaluate)
app.command("compare-sets", short_help="Compare two sets of images.")(evaluate.compare_sets)
app.command(short_help="Serve MLflow's page of the runs.")(mlflow_page.mlflow)
app.command(short_help="Check this machine, and say how to get what is missing.")(doctor.doctor)
app.command(short_help="Print the JSON Schema of job files.")(schema.schema)
app.add_typer(checkpoint.app, name="checkpoint", short_help="List, verify and export a run's checkpoints.")
app.add_typer(data.app, name="data", short_help="Make the data sets that jobs read.")
app.add_typer(ema.app, name="ema", short_help="Make averages of the weights, of any width.")
app.add_typer(extractors.app, name="extractors", short_help="Show the extractors of metrics; fetch their weights.")
app.add_typer(search.app, name="search", short_help="Search for hyper-parameters.")
app.add_typer(systems.app, name="systems", short_help="Show what can be trained.")


def run() -> None:
    """Run the command line on `sys.argv` and exit.

    Exit codes: 0 done, 1 the command says no (such as `doctor`), 2 a mistake that the printed error explains,
    75 stopped by SIGTERM and ready to be resumed, 130 interrupted. Any other exception is a defect of Bessemer and
    keeps its traceback.
    """
    try:
        app()
    except BessemerError as e:
        typer.echo(_one_screen(f"error: {e}"), err=True)
        sys.exit(2)


def _one_screen(text: str) -> str:
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"... and {len(lines) - _MOST_LINES + 1} more lines"]
    return "\n".join(lines)
