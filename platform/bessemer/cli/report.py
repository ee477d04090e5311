"""`bessemer report`: one page that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.locate import RunArgument, run_directory

__all__ = ["report"]


def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="File to write; report.html in the run directory if unset.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Also send to MLflow what it missed of the run.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print where the page is, and the table's row, as JSON.")
    ] = False,
) -> None:
    """Write a page with samples, metrics, curves and provenance of a run; it opens without a network."""
    from dataclasses import asdict

    from bessemer.cli.output import echo_json
    from bessemer.tracking.report import write_report
    from bessemer.tracking.runs import load_run, summarise

    directory = run_directory(run)
    page = write_report(directory, out)
    mlflow_run = None
    if mirror:  # after the page, so that MLflow gets it too
        from bessemer.tracking.mlflow_mirror import replay

        mlflow_run = replay(directory)
    if json:
        echo_json({"report": page.absolute(), "mlflow_run": mlflow_run, "run": asdict(summarise(load_run(directory)))})
    else:
        typer.echo(f"report: {page}")
        if mlflow_run:
            typer.echo(f"MLflow run: {mlflow_run}")
    if open_page:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())
