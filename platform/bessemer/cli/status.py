"""`bessemer status`: how a run is, here or on a cluster, once or live."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.submit import HERE, AddressOption, connect

if TYPE_CHECKING:
    from bessemer.orchestration.submission import Cluster, Submission
    from bessemer.tracking.status import RunStatus

__all__ = ["status"]

_OVER = ("finished", "failed", "stopped")


def status(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|ID", help="Run directory, the run's name below runs/, or what `bessemer submit` printed."
        ),
    ],
    address: AddressOption = HERE,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until the run ends, live on a terminal.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")] = 2.0,
    json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON, with all fields; with --watch an object per line.")
    ] = False,
) -> None:
    """Say how a run is: progress, speed, losses, last evaluation, age of its checkpoint, nodes, restarts, time left.

    A run directory on this machine is read as it lies there. Anything else is asked of the cluster at --address: how
    far such a run is can be told where its directory is seen from here too, and otherwise by what it printed last.
    """
    look = _look_at(run, address)
    if not watch:
        _print(look(), json)
    elif json:
        _each(look, every, _print_line)
    else:
        _watch(look, every)


def _look_at(run: str, address: str) -> Callable[[], dict[str, Any]]:
    """A function that finds out how the run is."""
    from bessemer.cli.locate import run_directory
    from bessemer.errors import RunError

    try:
        directory = run_directory(run)
    except RunError:
        if Path(run).is_absolute():
            raise
        cluster = connect(address)
        found = cluster.find(run)
        return lambda: _of_submission(cluster, cluster.look(found))
    return lambda: _facts(directory)


def _facts(directory: Path) -> dict[str, Any]:
    from bessemer.tracking.status import status_of

    return asdict(status_of(directory))


def _of_submission(cluster: Cluster, submission: Submission) -> dict[str, Any]:
    """What Ray knows of it, and how far it is where that can be seen."""
    from bessemer.errors import RunError

    try:
        progress: dict[str, Any] = _facts(Path(submission.path))
    except RunError:
        progress = {}
    return {
        **asdict(submission),
        # Also where progress says more: a head that booted again looks for drivers that died with it only once somebody
        # asks for a log.
        "last_line": _last_line(cluster, submission),
        "dashboard": cluster.page(submission),
        "progress": progress or None,
    }


def _last_line(cluster: Cluster, submission: Submission) -> str | None:
    from bessemer.errors import MachineError

    try:
        printed = cluster.logs(submission)
    except MachineError as e:
        return str(e)
    lines = [line for line in printed.splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def _print(found: dict[str, Any], json: bool) -> None:
    from bessemer.cli.output import echo_json

    if json:
        echo_json(found)
        return
    typer.secho(found.get("id") or found["name"], bold=True)
    for name, value in _lines(found):
        typer.echo(f"  {name:<11}{value}")


def _print_line(found: dict[str, Any]) -> None:
    import json

    from bessemer.cli.output import finite

    typer.echo(json.dumps(finite(found), ensure_ascii=False, default=str))


def _each(look: Callable[[], dict[str, Any]], every: float, show: Callable[[dict[str, Any]], None]) -> None:
    while True:
        found = look()
        show(found)
        if found["state"] in _OVER:
            return
        time.sleep(every)


def _watch(look: Callable[[], dict[str, Any]], every: float) -> None:
    """Redraw on a terminal; a line per look elsewhere."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        _each(look, every, lambda found: typer.echo(_in_one_line(found)))
        return
    with Live(console=console, auto_refresh=False) as live:

        def draw(found: dict[str, Any]) -> None:
            lines = [found.get("id") or found["name"], *(f"  {name:<11}{value}" for name, value in _lines(found))]
            live.update(Text("\n".join(lines)), refresh=True)

        try:
            _each(look, every, draw)
        except KeyboardInterrupt:
            return


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of everything that is known."""
    run = _progress(found)
    lines: list[tuple[str, str | None]] = [("state", _state(found))]
    if run is not None:
        lines += [
            ("progress", _kimg(run)),
            ("speed", _speed(run)),
            ("losses", "  ".join(f"{name} {value:.4g}" for name, value in run.losses.items())),
            ("evaluation", _evaluation(run)),
            ("checkpoint", _checkpoint(run)),
            ("workers", _workers(run)),
            ("restarts", str(run.restarts)),
            ("trouble", run.trouble),
        ]
    if found["state"] == "failed" and found.get("message") and not (run is not None and run.trouble):
        lines.append(("why", _why(found["message"])))
    lines += [
        ("run", found["path"]),
        ("commit", found.get("git_sha")),
        ("printed", found.get("last_line") if run is None else None),
        ("dashboard", found.get("dashboard")),
        ("MLflow", run.mlflow if run is not None else None),
    ]
    return [(name, value) for name, value in lines if value]


def _why(message: str) -> str:
    """One line of what Ray says of a failure: our own error, where the end of the log that it quotes has one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[0])


def _progress(found: dict[str, Any]) -> RunStatus | None:
    from bessemer.tracking.status import Evaluated, RunStatus

    facts = found.get("progress", found)
    if facts is None:
        return None
    evaluation = facts["evaluation"]
    return RunStatus(**{**facts, "evaluation": Evaluated(**evaluation) if evaluation else None})


def _in_one_line(found: dict[str, Any]) -> str:
    run = _progress(found)
    if run is None:
        return f"{time.strftime('%H:%M:%S')} {_state(found)}  {found.get('last_line') or ''}".rstrip()
    losses = "  ".join(f"{name} {value:.3f}" for name, value in run.losses.items())
    parts = [found["state"], _kimg(run), _speed(run), losses, run.trouble]
    return "  ".join([time.strftime("%H:%M:%S"), *filter(None, parts)])


def _state(found: dict[str, Any]) -> str:
    submitted = found.get("submitted")
    # Begin and end are by the clocks of two hosts, and now by a third.
    since = f" for {_time(max(0.0, (found['ended'] or time.time()) - submitted))}" if submitted else ""
    return f"{found['state']}{since}"


def _kimg(run: RunStatus) -> str:
    if run.total_kimg is None:
        return f"{run.kimg:.4g} kimg"
    share = f" ({min(1.0, run.kimg / run.total_kimg):.0%})" if run.total_kimg else ""
    return f"{run.kimg:.4g}/{run.total_kimg:g} kimg{share}"


def _speed(run: RunStatus) -> str | None:
    if run.img_per_s is None:
        return None
    return f"{run.img_per_s:.4g} img/s" + (f", {_time(run.eta_s)} left" if run.eta_s is not None else "")


def _evaluation(run: RunStatus) -> str | None:
    if (last := run.evaluation) is None:
        return None
    return f"{last.metric} {last.value:.4g} at {last.kimg:.4g} kimg, best {last.best:.4g}"


def _checkpoint(run: RunStatus) -> str:
    if run.checkpoint_age_s is None:
        return "none yet"
    return f"{run.checkpoint_kimg:.4g} kimg, {_time(run.checkpoint_age_s)} ago"


def _workers(run: RunStatus) -> str | None:
    if run.workers is None:
        return "none yet" if run.state == "running" else None
    of = "" if run.wanted_workers in (None, run.workers) else f" of {run.wanted_workers}"
    return f"{run.workers}{of} on " + ", ".join(f"{host} ({count})" for host, count in sorted(run.nodes.items()))


def _time(seconds: float) -> str:
    from datetime import timedelta

    return str(timedelta(seconds=round(seconds)))
