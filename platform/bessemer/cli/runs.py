"""`bessemer runs`: the table of all runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["runs"]


def runs(
    root: Annotated[Path, typer.Option(help="Directory that holds the runs.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, with all fields.")] = False,
) -> None:
    """List the runs, newest first, with their state and the best value of their first metric."""
    from datetime import datetime

    from bessemer.cli.output import echo_json, table
    from bessemer.tracking.runs import list_runs

    rows = list_runs(root)
    if json:
        echo_json([asdict(row) for row in rows])
        return
    sound = [row for row in rows if row.state != "broken"]
    if not sound:
        typer.echo(f"No runs in {root}. Start one: bessemer train JOB, or bessemer quickstart.")
    else:
        table(
            (
                "name",
                "state",
                "system",
                "kimg",
                "of",
                "metric",
                "best",
                "last",
                "img/s",
                "workers",
                "restarts",
                "created",
            ),
            [
                (
                    row.name,
                    row.state,
                    " ".join(filter(None, (row.system, row.preset))) or None,
                    row.kimg,
                    row.total_kimg,
                    row.metric,
                    row.best,
                    row.last,
                    row.img_per_s,
                    row.workers,
                    row.restarts,
                    f"{datetime.fromtimestamp(row.created):%Y-%m-%d %H:%M}" if row.created else None,
                )
                for row in sound
            ],
        )
    for row in rows:
        if row.state == "broken":
            typer.echo(f"skipped {row.path}: {row.note}", err=True)
