"""A search in MLflow: one run for the search, one below it for each trial, and the table and pictures on the former.

MLflow's page hides runs below others, so everything that a person wants to see at first lies on the search's own run.
Trials are mirrored as any run is, with their curves and samples. A thread does all of it: a search never waits for
MLflow, and what MLflow missed it gets when the search ends or is resumed.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from bessemer.files import write_atomically
from bessemer.spec.job import TrackingSpec
from bessemer.spec.search_load import load_search
from bessemer.tracking.files import read_json
from bessemer.tracking.mlflow_mirror import replay
from bessemer.tracking.mlflow_store import check_uri, quiet_mlflow, resolve_uri
from bessemer.tracking.search_journal import read_search
from bessemer.tracking.search_report import write_report

__all__ = ["SearchMirror"]

_PARENT, _SEARCH = "mlflow.parentRunId", "bessemer.search_id"
_SECONDS = 20.0
_MOST_PARAM = 500
_STATE = "mlflow.json"

_log = logging.getLogger(__name__)


class SearchMirror:
    """Mirrors a search from a thread of this process while it is entered. No method raises.

    Args:
        directory: of the search; relative sqlite paths start in the directory that holds it.
        spec: where to.
        seconds: between two looks at the journal.
    """

    def __init__(self, directory: Path, spec: TrackingSpec, seconds: float = _SECONDS) -> None:
        self._directory, self._spec, self._seconds = directory, spec, seconds
        self._uri = resolve_uri(spec.uri, directory.parent)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="search-mirror", daemon=True)
        self._sent: dict[str, float] = {}
        """Run of a trial -> how far it was when it was sent."""
        self._drawn: tuple[int, list[Path]] = -1, []
        """Length of the journal of which there are pictures, and their files."""
        self.problem: str | None = None
        """Why MLflow lacks something; None if it has everything."""

    def __enter__(self) -> SearchMirror:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()

    def finish(self, timeout: float = 120.0) -> None:
        """Send the rest, for so long at most."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._send(over=True)

    def _follow(self) -> None:
        while not self._stopping.wait(self._seconds):
            self._send(over=False)

    def _send(self, over: bool) -> None:
        try:
            check_uri(self._uri, self._directory.parent)
            quiet_mlflow()
            self._transfer(over)
            self.problem = None
        except Exception as e:  # tracking may fail; the search goes on
            if self.problem is None:
                _log.warning("MLflow: %s; the search goes on, and its directory has everything", e)
            self.problem = str(e)

    def _transfer(self, over: bool) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        client: Any = MlflowClient(tracking_uri=self._uri)
        search, table = load_search(self._directory / "search.yaml"), read_search(self._directory)
        parent, experiment = self._parent(client, search.name)
        for trial in table.trials.values():
            for run in sorted((self._directory / "trials").glob(f"{trial.name}*")):
                far = trial.kimg + trial.retries + (0.5 if trial.is_over else 0.0)
                if not (run / "run.json").is_file() or self._sent.get(run.name) == far:
                    continue
                child = replay(run, self._spec, self._directory.parent)
                client.set_tag(child, _PARENT, parent)
                client.set_tag(child, "bessemer.trial", trial.state)
                self._sent[run.name] = far
        best, spent, points = None, 0.0, []
        sign = -1.0 if search.objective.mode == "max" else 1.0
        finals = sorted(
            (r for t in table.trials.values() for r in t.results if r.rung == len(search.objective.rungs_kimg) - 1),
            key=lambda result: result.time,
        )
        for number, result in enumerate(finals):
            best = result.value if best is None else sign * min(sign * best, sign * result.value)
            spent += result.seconds
            points.append(Metric(f"best/{search.objective.metric}", best, int(result.time * 1000), number))
        points.append(Metric("trials", len(table.trials), int(1000 * (table.seconds or 1)), 0))
        client.log_batch(parent, metrics=points[-1000:])
        report = write_report(self._directory)
        client.log_text(parent, _csv(report["trials"]), "trials.csv")
        names = ("search.yaml", "search.jsonl", "report.html", "report.json")
        for path in (*(self._directory / name for name in names), *self._pictures(report)):
            client.log_artifact(parent, str(path))
        page = f"#/experiments/{experiment}/runs"
        lines = [f"{row['trial']} {row['state']} {row['value']}" for row in report["trials"][:20]]
        client.set_tag(parent, "mlflow.note.content", "\n".join([f"Best first; all in trials.csv. {page}", "", *lines]))
        if over:
            client.set_terminated(parent, "FINISHED" if table.ended else "KILLED")

    def _pictures(self, report: dict[str, Any]) -> list[Path]:
        """The pictures of the search, drawn anew where something happened since the last time."""
        said = int(report["journal_bytes"])
        if said != self._drawn[0]:
            from bessemer.tracking.search_figures import draw_pictures

            self._drawn = said, draw_pictures(self._directory, report)
        return self._drawn[1]

    def _parent(self, client: Any, name: str) -> tuple[str, str]:
        """The search's own run, made once, and its experiment."""
        known = read_json(self._directory / _STATE)
        if known is not None and "run" in known:
            client.update_run(known["run"], "RUNNING")
            return str(known["run"]), str(known["experiment"])
        experiment = client.get_experiment_by_name(self._spec.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(self._spec.experiment)
        identity = (read_json(self._directory / "search.json") or {}).get("id", "")
        found = client.search_runs([number], f"tags.`{_SEARCH}` = '{identity}'", max_results=1)
        run = found[0] if found else client.create_run(number, run_name=name, tags={_SEARCH: identity})
        for field, value in _parameters(self._directory).items():
            client.log_param(run.info.run_id, field, value)
        state = json.dumps({"run": run.info.run_id, "experiment": number})
        write_atomically(self._directory / _STATE, lambda file: file.write(state.encode()))
        return str(run.info.run_id), str(number)


def _parameters(directory: Path) -> dict[str, str]:
    """What the search varies and by what it judges, as MLflow's parameters."""
    search = load_search(directory / "search.yaml")
    found = {
        "metric": search.objective.metric,
        "scheduler": search.scheduler.name,
        "searcher": search.searcher.name,
        "trials": str(search.budget.trials),
        "rungs_kimg": str(list(search.objective.rungs_kimg)),
    }
    for field, dimension in search.space.items():
        said = dimension.model_dump(mode="json", exclude_defaults=True)
        found[f"space.{field}"[:250]] = json.dumps(said)[:_MOST_PARAM]
    return found


def _csv(rows: list[dict[str, Any]]) -> str:
    fields = sorted({field for row in rows for field in row["point"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = ("trial", "state", "kimg", "value", "standard_error", "device_hours")
    writer.writerow([*plain, *fields])
    for row in rows:
        writer.writerow([*(row[name] for name in plain), *(row["point"].get(field, "") for field in fields)])
    return out.getvalue()
