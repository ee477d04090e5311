"""`bessemer submit`, `jobs`, `logs` and `stop`: runs on a Ray cluster, through its dashboard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bessemer.orchestration.submission import Cluster, Submission

__all__ = ["HERE", "AddressOption", "connect", "jobs", "logs", "stop", "submit"]

AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="Dashboard of the cluster, http://HOST:8265. Its token: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="What `bessemer submit` printed, as `jobs` lists it.")]
HERE = "http://127.0.0.1:8265"


def submit(
    job: Annotated[Path | None, typer.Argument(help="Job file (YAML); `bessemer schema` documents its fields.")] = None,
    address: AddressOption = HERE,
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
            metavar="RUN",
            help="Instead of a job: go on with this run, by its ID, its directory on the cluster, or the URL to which "
            "it was uploaded.",
        ),
    ] = None,
    driver_on: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL=VALUE",
            help="Let the run's driver sit on a node with this label instead of the head: the run then survives a "
            "restart of the head, and ends with that node.",
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
    labels = _labels(driver_on)
    if resume is not None:
        if set_:
            raise SpecError("--set: a resumed run goes on with its own job; leave --set out, or submit a new job.")
        cluster = connect(address)
        submission = cluster.resume(resume, runs.absolute(), labels)
    else:
        assert job is not None
        spec, notes = check_before_sending(load_job(job, set_ or ()))
        cluster = connect(address)
        submission = cluster.submit(spec, runs.absolute(), labels)
        for note in notes:
            typer.echo(f"note: {note}", err=True)
    typer.echo(f"run {submission.path}", err=True)
    typer.echo(submission.id)
    typer.echo(f"dashboard {cluster.page(submission)}", err=True)
    if follow:
        _follow(cluster, submission, address)  # exits
    typer.echo(f"follow it: bessemer logs {submission.run} --follow{_where(address)}", err=True)


def jobs(
    address: AddressOption = HERE,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, with all fields.")] = False,
) -> None:
    """List the runs that were submitted to a cluster, newest first, as far back as the cluster remembers."""
    from dataclasses import asdict
    from datetime import datetime

    from bessemer.cli.output import echo_json, table

    found = connect(address).submissions()
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


def logs(
    id_: IdArgument,
    address: AddressOption = HERE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a submitted run has printed. With --follow, the exit code is that of the run."""
    cluster = connect(address)
    submission = cluster.find(id_)
    if follow:
        _follow(cluster, submission, address)
    else:
        typer.echo(cluster.logs(submission), nl=False)


def stop(
    id_: IdArgument,
    address: AddressOption = HERE,
    wait: Annotated[bool, typer.Option(help="Wait until the run has ended.")] = True,
) -> None:
    """Stop a submitted run in good order: its workers write a checkpoint first.

    `bessemer submit --resume ID` goes on from there.
    """
    cluster = connect(address)
    submission = cluster.find(id_)
    if submission.over:
        typer.echo(f"{submission.id} has {submission.state} already", err=True)
        return
    cluster.stop(submission)
    later = f"how it is: bessemer status {submission.id}{_where(address)}"
    if not wait:
        typer.echo(f"{submission.id} will stop; {later}", err=True)
        return
    typer.echo(f"{submission.id} writes a checkpoint and stops ...", err=True)
    try:
        ended = cluster.wait(submission)
    except KeyboardInterrupt:
        typer.echo(f"{submission.id} stops without us; {later}", err=True)
        raise typer.Exit(130) from None
    again = f"bessemer submit --resume {ended.run}{_where(address)}"
    if ended.state != "stopped":
        typer.echo(f"{ended.id} has {ended.state}", err=True)
        return
    if submission.state == "running":
        _check_stopped(cluster, ended, again, _where(address))
    typer.echo(f"{ended.id} has stopped; go on with: {again}", err=True)


def _check_stopped(cluster: Cluster, ended: Submission, again: str, where: str) -> None:
    """Refuse to call it stopped when workers were at work, and did not end by a checkpoint."""
    from bessemer.errors import MachineError, RunError
    from bessemer.training.stopping import STOPPED_LINE

    unknown = f"whether it wrote a last checkpoint is not known; go on with: {again}"
    try:
        printed = cluster.logs(ended)
    except MachineError as e:
        raise RunError(f"{e} So {unknown}") from None
    if not printed:
        raise RunError(f"{ended.id}: has ended, and the node of its driver has no log of it; {unknown}")
    if f"run {ended.path}" in printed.splitlines() and STOPPED_LINE not in printed:
        raise RunError(
            f"{ended.id}: has ended, but without a checkpoint of its last moment; see bessemer logs {ended.id}{where}, "
            f"then go on from the checkpoint before: {again}"
        )


def connect(address: str) -> Cluster:
    """The cluster at a dashboard's address."""
    import logging

    from bessemer.orchestration.submission import Cluster

    logging.disable(logging.INFO)  # Ray reports every file that it uploads
    return Cluster(address, lambda line: typer.echo(f"note: {line}", err=True))


def _labels(text: str | None) -> dict[str, str]:
    """`LABEL=VALUE`, read."""
    from bessemer.errors import SpecError

    if text is None:
        return {}
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value) or value[0] in "!(":
        raise SpecError(
            f"--driver-on {text}: is no label of a node; write LABEL=VALUE, as `ray start --labels` takes it."
        )
    return {key: value}


def _where(address: str) -> str:
    """What makes a command mean the same cluster, if anything must."""
    return "" if address == os.environ.get("RAY_API_SERVER_ADDRESS", HERE) else f" --address {address}"


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
    if ended.state != "finished" and ended.exit_code != 2:  # 2: a mistake that the printed error explains
        typer.echo(f"go on with: bessemer submit --resume {ended.run}{_where(address)}", err=True)
    codes = {"finished": 0, "stopped": EXIT_STOPPED}
    raise typer.Exit(codes.get(ended.state, ended.exit_code or 1))


def _duration(submission: Submission) -> str | None:
    import time
    from datetime import timedelta

    if submission.submitted is None:
        return None
    # Begin and end are by the clocks of two hosts, and now by a third.
    return str(timedelta(seconds=round(max(0.0, (submission.ended or time.time()) - submission.submitted))))
