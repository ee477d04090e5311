"""`bessemer report`: one page that shows a run, or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.locate import run_directory

__all__ = ["report"]


def report(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs: directories, or names below runs/.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; report.html in the directory of the first run if unset.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also draw each curve for a paper, as PNG and SVG, into this directory.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Also send to MLflow what it missed of the run.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print where the page is, and the table's row, as JSON.")
    ] = False,
) -> None:
    """Write a page with samples, metrics, curves and provenance of a run, or of several side by side.

    It is one file that opens without a network.
    """
    from bessemer.cli.output import echo_json
    from bessemer.tracking.report import write_report
    from bessemer.tracking.runs import load_run
    from bessemer.tracking.summary import summarise

    directories = [run_directory(one) for one in run]
    page = write_report(directories, out)
    drawn = []
    if figures is not None:
        from bessemer.tracking.figures import draw_figures

        drawn = draw_figures(directories, figures)
    mirrored = []
    if mirror:  # after the page, so that MLflow gets it too
        from bessemer.tracking.mlflow_mirror import replay

        mirrored = [replay(directory) for directory in directories]
    if json:
        rows = [summarise(load_run(directory)).as_dict() for directory in directories]
        echo_json({"report": page.absolute(), "figures": drawn, "mlflow_runs": mirrored, "runs": rows})
    else:
        typer.echo(f"report: {page}")
        if drawn:
            typer.echo(f"figures: {len(drawn) // 2} in {figures}, as PNG and SVG")
        for mlflow_run in mirrored:
            typer.echo(f"MLflow run: {mlflow_run}")
    if open_page:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())
