"""`bessemer search`: hyper-parameter searches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

__all__ = ["app"]

SearchArgument = Annotated[
    Path, typer.Argument(metavar="SEARCH", help="Directory of the search, or its name below searches/.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, with all fields.")]


class _RunByDefault(TyperGroup):
    """`bessemer search FILE` means `bessemer search run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = any(Path(word).suffix in (".yaml", ".yml") for word in args)  # options may stand before the file
        if is_named and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Search for hyper-parameters: `bessemer search FILE` runs the search that a file describes, with the options "
    "of `bessemer search run`.",
)


@app.command(short_help="Run a search.")
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Search file (YAML); docs/search.md describes it.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Directory of the search; by default searches/<its name>.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; by default that of the job, or RAY_ADDRESS.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the search, every corner of its space, and the machine, then stop.")
    ] = False,
) -> None:
    """Run a search: check it and every corner of its space, then train its trials, and say which is best.

    Everything about it lands in its directory. Whatever kills it, `bessemer search resume SEARCH` goes on.
    """
    from bessemer.orchestration.search import check_search, create_search, prepare_search

    prepared = prepare_search(file, address)
    path = directory or Path("searches") / prepared.search.name
    if dry_run:
        check_search(prepared, path.parent)
        typer.echo(f"ok: {file} can be run here; every corner of its space is a legal job")
        return
    _drive(create_search(prepared, path))


@app.command(short_help="Go on with a search that was interrupted.")
def resume(search: SearchArgument) -> None:
    """Go on with a search from where it stands: no trial is lost, and none is done twice.

    Trials that were under way go on from their newest checkpoints.
    """
    from bessemer.errors import RunError
    from bessemer.orchestration.search_directory import SearchDirectory
    from bessemer.tracking.search_journal import read_search

    directory = SearchDirectory.open(search)
    if (ended := read_search(directory.path).ended) is not None:
        raise RunError(f"{directory.path}: is over, {ended}; `bessemer search status {search}` shows it.")
    _drive(directory)


def _drive(directory: Any) -> None:
    from bessemer.orchestration.search import run_search

    typer.echo(f"search {directory.path}", err=True)
    try:
        run_search(directory, lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with: bessemer search resume {directory.path}", err=True)
        raise typer.Exit(130) from None
    _print_best(directory.path)


@app.command(short_help="Say how a search stands.")
def status(
    search: SearchArgument,
    importance: Annotated[
        bool, typer.Option("--importance", help="Say too how much each field of the space matters.")
    ] = False,
    most: Annotated[int, typer.Option("--most", min=1, help="Trials that are shown at most, the best ones.")] = 30,
    json: JsonOption = False,
) -> None:
    """Say how a search stands: its trials, best first, and what it has spent."""
    from bessemer.cli.output import echo_json, table
    from bessemer.spec.search_load import load_search
    from bessemer.tracking.files import is_locked
    from bessemer.tracking.search_journal import SEARCH_LOCK, read_search
    from bessemer.tracking.search_report import described_final, rows
    from bessemer.tracking.search_report import importance as importance_of

    path = _find(search)
    spec, known = load_search(path / "search.yaml"), read_search(path)
    found = rows(spec, known)
    state = "running" if is_locked(path / SEARCH_LOCK) else "over" if known.ended else "interrupted"
    matter = importance_of(spec, known) if importance else []
    if json:
        shares = [{"field": one.field, "share": one.share, "spread": one.spread} for one in matter]
        final = described_final(known)
        echo_json({"state": state, "ended": known.ended, "final": final, "trials": found, "importance": shares})
        return
    states = [trial.state for trial in known.trials.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
    hours = known.device_hours(spec.workers)
    typer.echo(f"{spec.name}: {state}, {len(known.trials)} of {spec.budget.trials} trials ({counts or 'none yet'})")
    kimg = known.kimg(len(spec.seeds or (0,)))
    typer.echo(f"spent: {kimg:.4g} kimg, {hours:.3g} device-hours in {known.seconds / 3600:.3g} hours")
    if known.final is not None:
        judged = sum(known.trials[number].final is not None for number in known.final.trials)
        typer.echo(
            f"final: {judged} of {len(known.final.trials)} finalists judged by {known.final.metric}, "
            f"{known.final_hours:.3g} device-hours"
        )
    fields = list(spec.space)
    names = [field.removeprefix("training.optimizers.").removeprefix("training.") for field in fields]
    plain = ["trial", "state", "kimg", "value", "standard_error"]
    headers = ["trial", "state", "kimg", spec.objective.metric, "±"]
    if known.final is not None:
        plain[2:2] = ["final", "final_standard_error"]
        headers[2:2] = [f"final {known.final.metric}", "±"]
    shown = [(*(row[name] for name in plain), *(_short(row["point"].get(f)) for f in fields)) for row in found[:most]]
    if shown:
        table((*headers, *names), shown)
    if len(found) > most:
        typer.echo(f"... and {len(found) - most} more (--most)")
    if importance:
        typer.echo("")
        if matter:
            table(("field", "importance", "±"), [(one.field, one.share, one.spread) for one in matter])
        else:
            typer.echo("Too few trials to say which field matters.")


@app.command(short_help="Say which trial is best.")
def best(search: SearchArgument, json: JsonOption = False) -> None:
    """Say which trial is best, by which judgement, and what its settings are.

    That is the last word of the final, where the search has one that is over; before, the last value of those that came
    furthest.
    """
    from bessemer.cli.output import echo_json
    from bessemer.spec.search_load import load_search
    from bessemer.tracking.search_journal import read_search
    from bessemer.tracking.search_report import rows

    path = _find(search)
    if not json:
        _print_best(path)
        return
    spec, known = load_search(path / "search.yaml"), read_search(path)
    winner = known.best(spec.objective.mode)
    echo_json(next((row for row in rows(spec, known) if winner is not None and row["trial"] == winner.name), None))


@app.command(short_help="Write a job file from the best trial.")
def promote(
    search: SearchArgument,
    out: Annotated[Path, typer.Option("--out", dir_okay=False, help="Job file to write.")],
    trial: Annotated[str | None, typer.Option(help="Another trial than the best, such as t0007.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field: --set training.total_kimg=1000. Repeatable."
        ),
    ] = None,
) -> None:
    """Write a job file from the best trial: the job of the search with the trial's settings, ready to be submitted.

    Length, evaluation, checkpoints and resources are those of the original job, not the short ones of the search.
    """
    from bessemer.cli.output import write_text
    from bessemer.orchestration.search_promote import promoted_job

    path = _find(search)
    text, said = promoted_job(path, trial, set_ or ())
    write_text(out, text)
    typer.echo(f"{said}\n{out}: bessemer train {out}, or bessemer submit {out} --address URL", err=True)


@app.command(short_help="Draw what a search found.")
def report(
    search: SearchArgument,
    pictures: Annotated[bool, typer.Option("--pictures", help="Write the page's pictures as PNG files, too.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a page, report.html, and report.json into the search's directory.

    The page shows the settings of all trials (parallel coordinates), which of them matter, and quality against cost.
    """
    from bessemer.cli.output import echo_json
    from bessemer.tracking.search_report import write_report

    path = _find(search)
    found, drawn = write_report(path), []
    if pictures:
        from bessemer.tracking.search_figures import draw_pictures

        drawn = draw_pictures(path, found)
    if json:
        echo_json(found)
        return
    typer.echo("\n".join(str(file) for file in (path / "report.html", path / "report.json", *drawn)))


@app.command(short_help="Print the JSON Schema of search files.")
def schema() -> None:
    """Print the JSON Schema of search files: every field, its type, default and meaning."""
    from bessemer.cli.output import echo_json
    from bessemer.spec.search_load import search_schema

    echo_json(search_schema())


def _find(search: Path) -> Path:
    from bessemer.errors import RunError

    for path in (search, Path("searches") / search):
        if (path / "search.json").is_file():
            return path
    raise RunError(f"{search}: is no directory of a search (search.json is expected there), nor is searches/{search}.")


def _print_best(path: Path) -> None:
    from bessemer.errors import some
    from bessemer.spec.search_load import describe_point, load_search
    from bessemer.tracking.search_journal import read_search
    from bessemer.tracking.search_report import best_in_words

    spec, known = load_search(path / "search.yaml"), read_search(path)
    winner = known.best(spec.objective.mode)
    if winner is None or winner.last is None:
        typer.echo("no trial was judged yet")
        return
    typer.echo(f"best: {best_in_words(spec, known)}")
    typer.echo(f"      {describe_point(winner.point)}")
    if close := [trial.name for trial in known.as_good(spec.objective.mode)]:
        typer.echo(f"      within one standard error of it: {some(close)}")
    typer.echo(f"next: bessemer search promote {path} --out {spec.name}-best.yaml", err=True)


def _short(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else str(value)
