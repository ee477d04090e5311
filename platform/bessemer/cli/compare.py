"""`bessemer compare` and `bessemer leaderboard`: runs beside each other, and in order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.runs import ExportOption, RootOption, WhereOption

if TYPE_CHECKING:
    from bessemer.tracking.ranking import Board
    from bessemer.tracking.summary import RunSummary
    from bessemer.tracking.tables import Table

__all__ = ["compare", "leaderboard"]


def compare(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs: directories, or names below ROOT.")],
    root: RootOption = Path("runs"),
    every: Annotated[bool, typer.Option("--all", help="Also the fields in which the runs agree.")] = False,
    export: ExportOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Set runs side by side: results, the job's fields that differ, and where the runs come from.

    Behind the best value of each metric stands its distance to that of the first run, in standard errors of the
    difference, or why the two cannot be compared.
    """
    from bessemer.cli.output import echo_json, table
    from bessemer.tracking.comparison import compare_runs
    from bessemer.tracking.tables import export_table

    rows = [_find(name, root) for name in run]
    shown = compare_runs(rows, every=every)
    if export is not None:
        export_table(shown, export)
    if json:
        echo_json({"runs": [row.as_dict() for row in rows], "table": shown.as_dicts()})
        return
    table(shown.columns, shown.rows)
    if export is not None:
        typer.echo(f"wrote {export}", err=True)


def leaderboard(
    metric: Annotated[
        str | None, typer.Option("--metric", "-m", help="Metric to rank by. Default: that of most runs.")
    ] = None,
    root: RootOption = Path("runs"),
    where: WhereOption = None,
    export: ExportOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the boards as JSON.")] = False,
) -> None:
    """Rank the runs by the best value of a metric, with the fields of the job in which they differ.

    Only values of one protocol are ranked together: same extractor and weights, number of images, reference, seed and
    moving average. Others have a board of their own, which says why. `=` marks values within two standard errors of
    the first: evaluating again could turn them around.
    """
    from collections import Counter

    from bessemer.cli.output import echo_json
    from bessemer.errors import RunError
    from bessemer.tracking.index import list_runs
    from bessemer.tracking.ranking import rank
    from bessemer.tracking.tables import export_table, matching

    rows = matching([row for row in list_runs(root) if row.state != "broken"], where or [])
    counts = Counter(curve.metric for row in rows for curve in row.curves)
    if metric is None:
        firsts = Counter(row.metric for row in rows if row.metric)
        metric = firsts.most_common(1)[0][0] if firsts else ""
    if metric not in counts:
        known = ", ".join(sorted(counts)) or "none yet"
        raise RunError(f"--metric {metric or 'unset'}: no run below {root} was evaluated by it; evaluated: {known}.")
    boards = rank(rows, metric)
    if export is not None:
        export_table(_export(boards), export)
    if json:
        echo_json({"metric": metric, "boards": [_as_dict(board) for board in boards]})
        return
    without = [row.name for row in rows if row.curve(metric) is None]
    for number, board in enumerate(boards):
        _echo_board(board, is_first=number == 0)
    if without:
        typer.echo(f"\nwithout {metric}: {', '.join(without[:20])}{' ...' if len(without) > 20 else ''}")
    if export is not None:
        typer.echo(f"wrote {export}", err=True)


def _find(name: str, root: Path) -> RunSummary:
    from bessemer.errors import RunError
    from bessemer.tracking.summary import read_summary

    for path in (Path(name), root / name):
        row = read_summary(path) if path.is_dir() else None
        if row is not None and row.state != "broken":
            return row
        if row is not None:
            raise RunError(f"{path}: {row.note}; `bessemer runs` lists the runs that can be read.")
    raise RunError(f"{name}: is no run directory, and {root / name} is none either; `bessemer runs` lists the runs.")


def _echo_board(board: Board, is_first: bool) -> None:
    from bessemer.cli.output import table
    from bessemer.tracking.ranking import PROTOCOL_LABELS, protocol_text, short
    from bessemer.tracking.tables import differing

    direction = "higher" if board.higher_is_better else "lower"
    count = len(board.places)
    if not is_first:
        typer.echo("")
    if board.problem is not None:
        typer.echo(f"{board.metric}, not ranked, because {board.problem}")
        table(("run", "best", "at kimg"), [(p.row.name, p.curve.best, p.curve.best_kimg) for p in board.places])
        return
    typer.echo(f"{board.metric}, {direction} is better; {count} run{'' if count == 1 else 's'} by one protocol:")
    typer.echo(f"  {protocol_text(board.protocol)}")
    if not is_first:
        why = "; ".join(
            f"{PROTOCOL_LABELS[name]} {short(name, here)} instead of {short(name, there)}"
            for name, (here, there) in board.differs.items()
        )
        typer.echo(f"  not ranked with those above: {why}")
    fields = differing([place.row for place in board.places])
    header = ("#", "run", "best", "±", "behind", "sigmas", "at kimg", "evaluations", "device-h", "state", *fields)
    table(
        header,
        [
            (
                f"{place.rank}{'=' if place.tied else ''}",
                place.row.name,
                place.curve.best,
                place.curve.standard_error,
                place.behind,
                place.sigmas if place.rank > 1 else None,
                place.curve.best_kimg,
                place.curve.evaluations,
                place.row.device_hours,
                place.row.state,
                *(place.row.job.get(name) for name in fields),
            )
            for place in board.places
        ],
    )


def _as_dict(board: Board) -> dict[str, Any]:
    return {
        "metric": board.metric,
        "higher_is_better": board.higher_is_better,
        "ranked": board.problem is None,
        "problem": board.problem,
        "protocol": board.protocol,
        "differs_from_first": {name: list(pair) for name, pair in board.differs.items()},
        "places": [_place(board, index) for index in range(len(board.places))],
    }


def _place(board: Board, index: int) -> dict[str, Any]:
    place = board.places[index]
    return {
        "rank": place.rank if board.problem is None else None,
        "run": place.row.name,
        "best": place.curve.best,
        "standard_error": place.curve.standard_error,
        "behind": place.behind,
        "sigmas": place.sigmas,
        "tied_with_first": place.tied,
        "best_kimg": place.curve.best_kimg,
        "evaluations": place.curve.evaluations,
        "device_hours": place.row.device_hours,
        "state": place.row.state,
        "weights_sha256": place.curve.weights_sha256,
    }


def _export(boards: list[Board]) -> Table:
    from bessemer.tracking.tables import Table, differing

    fields = differing([place.row for board in boards for place in board.places])
    columns: tuple[str, ...] = ()
    rows = []
    for number, board in enumerate(boards, 1):
        for index, place in enumerate(board.places):
            cells = {"board": number, "metric": board.metric, **_place(board, index)}
            columns = (*cells, *fields)
            rows.append((*cells.values(), *(place.row.job.get(name) for name in fields)))
    return Table(columns, rows)
