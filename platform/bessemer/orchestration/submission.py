"""Runs as jobs of a Ray cluster: submitted over HTTP, and independent of the machine that submitted them.

This package and the job travel with the submission; its dependencies are those of the cluster's image. On the cluster,
the job's command is the same `bessemer train` or `bessemer resume` that a person would type there.
"""

from __future__ import annotations

import contextlib
import difflib
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import bessemer
from bessemer.errors import DataError, MachineError, RunError
from bessemer.orchestration.dashboard import auth_headers, dashboard_url, jobs_client
from bessemer.orchestration.provenance import Provenance
from bessemer.orchestration.tail import tail
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job
from bessemer.stores.opening import is_url

__all__ = ["Cluster", "Submission", "SubmissionState", "check_before_sending"]

SubmissionState = Literal["pending", "running", "finished", "stopped", "failed"]

_STATES: dict[str, SubmissionState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "STOPPED": "stopped",
    "FAILED": "failed",
}
_GRACE_SECONDS = 900
"""Time that workers have to write a checkpoint before Ray kills the driver; its own default is 3 seconds."""
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = (10.0, 60.0)
"""To connect, and to hear something then."""
_LOG_SECONDS = (10.0, 15.0)
"""The head asks the node of the driver for its log, which may be gone."""
_SILENT_SECONDS = 10.0
_OUTAGE_SECONDS = 600.0
"""In which a head may boot again, while runs whose driver sits elsewhere go on."""


@dataclass(frozen=True)
class Submission:
    """One submission of a run. A resumed run has several: `NAME`, `NAME.2`, `NAME.3`, ..."""

    id: str
    """What Ray calls it."""
    run: str
    """Name of the run: the id of its first submission."""
    path: str
    """Run directory, as the cluster sees it."""
    state: SubmissionState
    number: int
    """1 for the run's first submission."""
    submitted: float | None
    """Unix seconds."""
    ended: float | None
    git_sha: str | None
    exit_code: int | None
    """Of the driver, once it has ended by itself."""
    message: str | None
    """What Ray says of the state."""

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state not in ("pending", "running")


def check_before_sending(job: JobSpec) -> tuple[JobSpec, list[str]]:
    """Check what can be checked without the cluster, and make the job fit to travel.

    Returns:
        the job, with an absolute data path and without `resources.address`, and what only the cluster can check.

    Raises:
        BessemerError: names the field or file, the value, the rule and the fix.
    """
    from bessemer.evaluation.names import parse_metric, split_metrics
    from bessemer.orchestration.preflight import with_absolute_paths
    from bessemer.orchestration.worker import check_job
    from bessemer.systems.registry import resolve_config

    for name in split_metrics(job.evaluation.metrics).compared:
        parse_metric(name)
    resolve_config(job.system.name, job.system.preset, job.system.config)
    left = []
    data = Path(job.data.path)
    if data.exists():
        check_job(job)
    elif data.is_absolute():
        left.append(f"data.path: {data} is not on this machine; the cluster will check the job against it")
    else:
        raise DataError(
            f"data.path: {data} is not on this machine; write the absolute path that the data set has on the cluster."
        )
    resources = job.resources.model_copy(update={"address": None})  # it is trained where it is sent to
    return with_absolute_paths(job).model_copy(update={"resources": resources}), left


class Cluster:
    """The jobs of a Ray cluster that are runs of Bessemer.

    Args:
        address: of the cluster's dashboard.
        say: told when something that is waited for is not there, and when it is back.

    Raises:
        SpecError: this is no address of a dashboard.
        MachineError: nothing, or something else, answers there, or it wants another token.
    """

    def __init__(self, address: str, say: Callable[[str], object] = lambda line: None) -> None:
        self.url, self._say = dashboard_url(address), say
        self._client = jobs_client(self.url, _ANSWER_SECONDS)

    def submit(self, job: JobSpec, runs: Path, driver_on: Mapping[str, str] | None = None) -> Submission:
        """Start a new run, in a directory of its own below `runs`.

        Args:
            job: as :func:`check_before_sending` returns it.
            runs: directory that all nodes see.
            driver_on: labels of the node that its driver shall run on; the head without.

        Raises:
            MachineError: no node has these labels.
        """
        run = f"{job.name}-{secrets.token_hex(3)}"
        path = runs / run
        return self._send(run, str(path), 1, ["train", "job.yaml", "--run-dir", str(path)], driver_on, job)

    def resume(self, run: str, runs: Path, driver_on: Mapping[str, str] | None = None) -> Submission:
        """Go on with a run that was submitted before, with the run directory `run`, or with a run in a store.

        Args:
            run: its name, an absolute path, or the URL to which it was uploaded.
            runs: directory that all nodes see, in which a run from a store gets its directory.
            driver_on: labels of the node that its driver shall run on; the head without.

        Raises:
            RunError: there is no such run, or it is being trained.
            MachineError: no node has these labels.
        """
        command = ["resume", run]
        if is_url(run):
            name = run.rstrip("/").rpartition("/")[2]
            path, command = str(runs / name), [*command, "--runs", str(runs)]
            found = [s for s in self.submissions() if s.path == path]
        elif Path(run).is_absolute():
            found = [s for s in self.submissions() if s.path == run]
            name, path = (found[0].run if found else Path(run).name), run
        else:
            name, path = (newest := self.find(run)).run, newest.path
            command = ["resume", path]
            found = [s for s in self.submissions() if s.run == name]
        if busy := [s for s in found if not s.over]:
            raise RunError(f"{run}: is {busy[0].state} as {busy[0].id}; `bessemer stop {busy[0].id}` stops it.")
        number = max((s.number for s in found), default=1) + 1
        return self._send(name, path, number, command, driver_on)

    def submissions(self) -> list[Submission]:
        """All submissions of Bessemer that the cluster remembers, newest first."""
        with self._refusals():
            found = [_read(details) for details in self._client.list_jobs()]
        return sorted(filter(None, found), key=lambda s: (s.submitted or 0.0, s.number), reverse=True)

    def find(self, name: str) -> Submission:
        """The newest submission of the run `name`, or the one that is named exactly: `NAME.2`, also `NAME.1`.

        Raises:
            RunError: the cluster knows none.
        """
        known = self.submissions()
        for submission in known:
            if name in (submission.run, f"{submission.run}.{submission.number}"):
                return submission
        names = sorted({s.run for s in known} | {s.id for s in known})
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise RunError(f"{name}: {self.url} knows no such run.{hint} `bessemer jobs` lists them.")

    def page(self, submission: Submission) -> str:
        """Where Ray's dashboard shows it."""
        return self._page(submission.id)

    def logs(self, submission: Submission) -> str:
        """What the run's driver has printed so far.

        Raises:
            MachineError: the node of the driver, which has it, does not answer.
        """
        import requests

        with self._refusals():
            try:
                return str(self._get(f"/api/jobs/{submission.id}/logs", _LOG_SECONDS)["logs"])
            except (requests.ReadTimeout, requests.HTTPError):
                raise MachineError(
                    f"{submission.id}: its log is on the node of its driver, which does not answer; what its workers "
                    f"print is in {submission.path}/logs."
                ) from None

    def follow(self, submission: Submission) -> Iterator[str]:
        """What the run's driver prints, from the beginning, until it ends; goes on where a connection broke.

        Raises:
            MachineError, RunError: as :meth:`look`.
        """
        import aiohttp

        url, shown = f"{self.url}/api/jobs/{submission.id}/logs/tail", 0
        while True:
            passed = 0
            with (
                contextlib.suppress(OSError, aiohttp.ClientError),
                contextlib.closing(tail(url, auth_headers(), _SILENT_SECONDS)) as texts,
            ):
                for text in texts:
                    if text is None:  # also where the node of the driver is gone, which nobody tells this connection
                        if self.look(submission).over:
                            break
                        continue
                    new = text[max(0, shown - passed) :]
                    passed += len(text)
                    shown = max(shown, passed)
                    if new:
                        yield new
            if self.look(submission).over:
                break
            time.sleep(_LOOK_SECONDS)
        try:
            yield from filter(None, [self.logs(submission)[shown:]])
        except MachineError as e:
            self._say(str(e))

    def stop(self, submission: Submission) -> None:
        """Ask the run to write a checkpoint and end; returns at once."""
        with self._refusals():
            self._client.stop_job(submission.id)

    def look(self, submission: Submission) -> Submission:
        """How a submission stands now; a cluster that does not answer is waited for.

        Raises:
            MachineError: it has not answered for ten minutes.
            RunError: it does not know the run any more.
        """
        end, silent = time.monotonic() + _OUTAGE_SECONDS, False
        while True:
            try:
                found = self.find(f"{submission.run}.{submission.number}")
            except MachineError as e:
                if time.monotonic() > end:
                    raise
                if not silent:
                    self._say(f"{e} It is waited for.")
                silent = True
                time.sleep(_LOOK_SECONDS)
            except RunError:
                raise RunError(
                    f"{submission.id}: {self.url} does not know it any more, as a cluster that was started anew; go on "
                    f"with: bessemer submit --resume {submission.path}"
                ) from None
            else:
                if silent:
                    self._say(f"{self.url}: answers again")
                return found

    def wait(self, submission: Submission) -> Submission:
        """Wait until a submission has ended; returns it as it stands then.

        Raises:
            MachineError, RunError: as :meth:`look`.
        """
        while not (now := self.look(submission)).over:
            time.sleep(_LOOK_SECONDS)
        return now

    def _send(
        self,
        run: str,
        path: str,
        number: int,
        command: list[str],
        driver_on: Mapping[str, str] | None,
        job: JobSpec | None = None,
    ) -> Submission:
        """Upload this package and what belongs to the submission, and let Ray start it."""
        if driver_on:
            self._check_labels(driver_on)
        name = run if number == 1 else f"{run}.{number}"
        here = Provenance.here()
        provenance = replace(here, record={**here.record, "dashboard": self._page(name)})
        metadata = {"bessemer.run": run, "bessemer.path": path, "bessemer.number": str(number)}
        metadata["bessemer.git_sha"] = provenance.record.get("git_sha", "")
        with tempfile.TemporaryDirectory() as aside, self._refusals("; `bessemer jobs` tells whether it took the run"):
            provenance.write(Path(aside))
            if job is not None:
                (Path(aside) / "job.yaml").write_text(dump_job(job))
            self._client.submit_job(
                # exec: signals must reach the driver, not a shell
                entrypoint=shlex.join(["exec", "python", "-m", "bessemer.cli", *command, "--submission", "."]),
                submission_id=name,
                metadata=metadata,
                entrypoint_label_selector=dict(driver_on or {}) or None,
                runtime_env={
                    "working_dir": aside,
                    "py_modules": [str(Path(bessemer.__file__).parent)],
                    "excludes": ["__pycache__"],
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_SECONDS)},
                },
            )
        return next(s for s in self.submissions() if s.id == name)

    def _check_labels(self, wanted: Mapping[str, str]) -> None:
        """Refuse labels that no living node has: Ray would wait a quarter of an hour for one."""
        with self._refusals():
            answer = self._get("/api/v0/nodes?detail=1&limit=10000", _ANSWER_SECONDS)
        nodes = [n for n in answer["data"]["result"]["result"] if n["state"] == "ALIVE"]
        labels: list[dict[str, str]] = [{} if n["is_head_node"] else n["labels"] or {} for n in nodes]
        if any(wanted.items() <= each.items() for each in labels):
            return
        own = sorted({f"{k}={v}" for each in labels for k, v in each.items() if k != "ray.io/node-id"})
        asked = ", ".join(f"{k}={v}" for k, v in wanted.items())
        raise MachineError(
            f"--driver-on {asked}: no node beside the head has this label; there are: {', '.join(own) or 'none'}. "
            f"Start one with `ray start --labels {asked}`, or leave the option out: the driver runs on the head then."
        )

    def _page(self, name: str) -> str:
        return f"{self.url}/#/jobs/{name}"

    def _get(self, path: str, seconds: tuple[float, float]) -> Any:
        import requests

        answer = requests.get(f"{self.url}{path}", headers=auth_headers(), timeout=seconds)
        answer.raise_for_status()
        return answer.json()

    @contextlib.contextmanager
    def _refusals(self, more: str = "") -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except requests.RequestException as e:
            raise MachineError(f"{self.url}: does not answer any more ({type(e).__name__}){more}.") from None
        except AuthenticationError:
            raise MachineError(
                f"{self.url}: refuses the token; set RAY_AUTH_TOKEN_PATH to that of this cluster."
            ) from None
        except RuntimeError as e:
            raise MachineError(f"{self.url}: refused the request ({str(e).strip().splitlines()[0][:300]}).") from None


def _read(details: Any) -> Submission | None:
    """What Ray knows of a job; None if it is no run of ours."""
    metadata = details.metadata or {}
    run, path, number = (metadata.get(f"bessemer.{key}") for key in ("run", "path", "number"))
    if details.submission_id is None or run is None or path is None or number is None:
        return None
    return Submission(
        id=details.submission_id,
        run=run,
        path=path,
        state=_STATES[str(getattr(details.status, "value", details.status))],
        number=int(number),
        submitted=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        git_sha=metadata.get("bessemer.git_sha") or None,
        exit_code=details.driver_exit_code,
        message=details.message,
    )
