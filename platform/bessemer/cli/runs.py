"""`bessemer runs`: the table of all runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bessemer.tracking.summary import RunSummary
    from bessemer.tracking.tables import Table

__all__ = ["ExportOption", "RootOption", "WhereOption", "runs"]

RootOption = Annotated[Path, typer.Option(help="Directory that holds the runs.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        "-w",
        metavar="'FIELD OP VALUE'",
        help="Only runs that meet this, such as state=finished, system~gan, 'training.batch_size>=64' or "
        "'kid_efflite0<0.2'; OP is one of = != < <= > >= ~ (contains). Several must all hold.",
    ),
]
ExportOption = Annotated[Path | None, typer.Option(help="Also write the table to this file, .csv or .parquet.")]

_COLUMNS = {
    "name": "name",
    "state": "state",
    "kimg": "kimg",
    "total_kimg": "of",
    "metric": "metric",
    "best": "best",
    "standard_error": "±",
    "best_kimg": "at kimg",
    "last": "last",
    "device_hours": "device-h",
    "img_per_s": "img/s",
    "workers": "workers",
    "restarts": "restarts",
}


def runs(
    root: RootOption = Path("runs"),
    where: WhereOption = None,
    sort: Annotated[
        str | None,
        typer.Option(help="Sort by a column, a field of the job, or a metric; -FIELD for largest first."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", "-m", help="Metric whose best is shown. Default: the first of each job.")
    ] = None,
    params: Annotated[
        bool, typer.Option("--params", "-p", help="Add the fields of the job that differ between these runs.")
    ] = False,
    export: ExportOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, with all fields.")] = False,
) -> None:
    """List the runs, newest first, with their state and the best value of a metric.

    Best values of different protocols stand side by side here; `bessemer leaderboard` ranks what is comparable.
    """
    from bessemer.cli.output import echo_json, table
    from bessemer.tracking.index import list_runs
    from bessemer.tracking.tables import export_table, matching, sorted_rows

    everything = list_runs(root)
    sound = [row for row in everything if row.state != "broken"]
    rows = matching(sound, where or [])
    if metric is not None:
        rows = [row.judged_by(metric) for row in rows]
    rows = sorted_rows(rows, sort)
    shown = _table(rows, params)
    if export is not None:
        export_table(shown, export)
    if json:
        broken = [row for row in everything if row.state == "broken"] if not where else []
        echo_json([row.as_dict() for row in [*rows, *broken]])
        return
    if not sound:
        typer.echo(f"No runs in {root}. Start one: bessemer train JOB, or bessemer quickstart.")
    elif not rows:
        typer.echo(f"None of the {len(sound)} runs in {root} meets {' and '.join(where or [])}.")
    else:
        table(shown.columns, shown.rows)
    if export is not None:
        typer.echo(f"wrote {export}", err=True)
    for row in everything:
        if row.state == "broken":
            typer.echo(f"skipped {row.path}: {row.note}", err=True)


def _table(rows: list[RunSummary], params: bool) -> Table:
    from datetime import datetime

    from bessemer.tracking.tables import Table, differing

    fields = [name for name in differing(rows) if name not in ("system.name", "system.preset")] if params else []

    def cells(row: RunSummary) -> tuple[Any, ...]:
        system = " ".join(filter(None, (row.system, row.preset))) or None
        created = f"{datetime.fromtimestamp(row.created):%Y-%m-%d %H:%M}" if row.created else None
        plain = [getattr(row, name) for name in _COLUMNS]
        return (*plain[:2], system, *plain[2:], created, *(row.job.get(name) for name in fields))

    headers = list(_COLUMNS.values())
    return Table((*headers[:2], "system", *headers[2:], "created", *fields), [cells(row) for row in rows])
