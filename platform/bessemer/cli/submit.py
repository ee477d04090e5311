"""`bessemer submit`, `jobs`, `status`, `logs` and `stop`: runs on a Ray cluster, through its dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bessemer.orchestration.submission import Cluster, Submission

__all__ = ["jobs", "logs", "status", "stop", "submit"]

AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="Dashboard of the cluster, http://HOST:8265. Its token: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="What `bessemer submit` printed, as `jobs` lists it.")]
_HERE = "http://127.0.0.1:8265"


def submit(
    job: Annotated[Path | None, typer.Argument(help="Job file (YAML); `bessemer schema` documents its fields.")] = None,
    address: AddressOption = _HERE,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field: --set training.total_kimg=20. Repeatable."
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="Directory that holds the runs: on storage that all nodes see at the same path.")
    ] = Path("runs"),
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Instead of a job: go on with this run, by its ID or its directory on the cluster."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what the run prints, until it ends.")] = False,
) -> None:
    """Check a job, send it with this version of Bessemer to a Ray cluster, and let it run there.

    The run does not need this machine any more: `bessemer logs ID -f` looks at it again from anywhere. Dependencies
    are those of the cluster; what differs from here is noted at the beginning of the run's log.
    With --follow, the exit code is that of the run: 0 finished, 75 stopped and ready to be resumed, else failed.
    """
    from bessemer.errors import SpecError
    from bessemer.orchestration.submission import check_before_sending
    from bessemer.spec.load import load_job

    if (job is None) == (resume is None):
        raise SpecError("submit: give either a job file, or --resume RUN.")
    if resume is not None:
        if set_:
            raise SpecError("--set: a resumed run goes on with its own job; leave --set out, or submit a new job.")
        cluster = _cluster(address)
        submission = cluster.resume(resume)
    else:
        assert job is not None
        spec, notes = check_before_sending(load_job(job, set_ or ()))
        cluster = _cluster(address)
        submission = cluster.submit(spec, runs.absolute())
        for note in notes:
            typer.echo(f"note: {note}", err=True)
    typer.echo(f"run {submission.path}", err=True)
    typer.echo(submission.id)
    if follow:
        _follow(cluster, submission, address)  # exits
    typer.echo(f"follow it: bessemer logs {submission.run} --follow{_where(address)}", err=True)


def jobs(
    address: AddressOption = _HERE,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, with all fields.")] = False,
) -> None:
    """List the runs that were submitted to a cluster, newest first, as far back as the cluster remembers."""
    from dataclasses import asdict
    from datetime import datetime

    from bessemer.cli.output import echo_json, table

    found = _cluster(address).submissions()
    if json:
        echo_json([asdict(submission) for submission in found])
    elif not found:
        typer.echo(f"No runs were submitted to {address}. Submit one: bessemer submit JOB{_where(address)}")
    else:
        table(
            ("id", "state", "submitted", "for", "run"),
            [
                (
                    s.id,
                    s.state,
                    f"{datetime.fromtimestamp(s.submitted):%Y-%m-%d %H:%M}" if s.submitted else None,
                    _duration(s),
                    s.path,
                )
                for s in found
            ],
        )


def status(
    id_: IdArgument,
    address: AddressOption = _HERE,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON, with all fields.")] = False,
) -> None:
    """Say how a submitted run is: its state, how long it has been at work, and what it printed last.

    Where the run's directory can be seen from here, also how far it is.
    """
    from dataclasses import asdict

    from bessemer.cli.output import echo_json

    cluster = _cluster(address)
    submission = cluster.find(id_)
    last, progress = _last_line(cluster, submission), _progress(submission)
    if json:
        echo_json({**asdict(submission), "last_line": last, "progress": progress})
        return
    lines: list[tuple[str, str | None]] = [
        ("state", f"{submission.state} {_duration(submission) or ''}".strip()),
        ("run", submission.path),
    ]
    if progress:
        shown = ("kimg", "total_kimg", "img_per_s", "workers", "restarts", "metric", "best", "last")
        lines.append(("progress", ", ".join(f"{k} {_short(progress[k])}" for k in shown if progress[k] is not None)))
    if submission.state == "failed" and submission.message:
        lines.append(("why", submission.message.splitlines()[0]))
    lines += [("commit", submission.git_sha), ("printed", last), ("dashboard", f"{cluster.url}/#/jobs/{submission.id}")]
    typer.secho(submission.id, bold=True)
    for name, text in lines:
        if text:
            typer.echo(f"  {name:<10}{text}")


def logs(
    id_: IdArgument,
    address: AddressOption = _HERE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a submitted run has printed. With --follow, the exit code is that of the run."""
    cluster = _cluster(address)
    submission = cluster.find(id_)
    if follow:
        _follow(cluster, submission, address)
    else:
        typer.echo(cluster.logs(submission), nl=False)


def stop(
    id_: IdArgument,
    address: AddressOption = _HERE,
    wait: Annotated[bool, typer.Option(help="Wait until the run has ended.")] = True,
) -> None:
    """Stop a submitted run in good order: its workers write a checkpoint first.

    `bessemer submit --resume ID` goes on from there.
    """
    from bessemer.errors import RunError
    from bessemer.training.stopping import STOPPED_LINE

    cluster = _cluster(address)
    submission = cluster.find(id_)
    if submission.over:
        typer.echo(f"{submission.id} has {submission.state} already", err=True)
        return
    cluster.stop(submission)
    if not wait:
        typer.echo(f"{submission.id} will stop; how it is: bessemer status {submission.id}{_where(address)}", err=True)
        return
    ended = cluster.wait(submission)
    if ended.state != "stopped":
        typer.echo(f"{ended.id} has {ended.state}", err=True)
        return
    if submission.state == "running" and STOPPED_LINE not in cluster.logs(ended):
        raise RunError(
            f"{ended.id}: has ended, but without a checkpoint of its last moment; see bessemer logs {ended.id}, then "
            f"go on from the checkpoint before: bessemer submit --resume {ended.run}{_where(address)}"
        )
    typer.echo(f"{ended.id} has stopped; go on with: bessemer submit --resume {ended.run}{_where(address)}", err=True)


def _cluster(address: str) -> Cluster:
    import logging

    from bessemer.orchestration.submission import Cluster

    logging.disable(logging.INFO)  # Ray reports every file that it uploads
    return Cluster(address)


def _where(address: str) -> str:
    return "" if address == _HERE else f" --address {address}"


def _follow(cluster: Cluster, submission: Submission, address: str) -> None:
    """Print what the run prints until it ends, and exit as it does."""
    from bessemer.training.stopping import EXIT_STOPPED

    try:
        for text in cluster.follow(submission):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        typer.echo(
            f"{submission.id} goes on without us; stop it: bessemer stop {submission.run}{_where(address)}", err=True
        )
        raise typer.Exit(130) from None
    ended = cluster.wait(submission)
    typer.echo(f"{ended.id} {ended.state}: {ended.path}", err=True)
    codes = {"finished": 0, "stopped": EXIT_STOPPED}
    raise typer.Exit(codes.get(ended.state, ended.exit_code or 1))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(submission: Submission) -> str | None:
    import time
    from datetime import timedelta

    if submission.submitted is None:
        return None
    return str(timedelta(seconds=round((submission.ended or time.time()) - submission.submitted)))


def _last_line(cluster: Cluster, submission: Submission) -> str | None:
    lines = [line for line in cluster.logs(submission).splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def _progress(submission: Submission) -> dict[str, Any] | None:
    """The run's row of `bessemer runs`, where its directory can be seen from this machine."""
    from dataclasses import asdict

    from bessemer.errors import RunError
    from bessemer.tracking.runs import load_run
    from bessemer.tracking.summary import summarise

    try:
        return asdict(summarise(load_run(submission.path)))
    except RunError:
        return None
