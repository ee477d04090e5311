"""A search in MLflow: one run for the search, one below it for each trial, and the table and pictures on the former.

MLflow's page hides runs below others, so everything that a person wants to see at first lies on the search's own run:
its description is a table of the best trials, each with a link to its runs. Trials are mirrored as any run is, with
their curves and samples. A thread does all of it: a search never waits for MLflow, and what MLflow missed it gets when
the search ends or is resumed.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bessemer.files import write_atomically
from bessemer.spec.job import TrackingSpec
from bessemer.spec.search import SearchSpec
from bessemer.spec.search_load import load_search
from bessemer.tracking.files import read_json
from bessemer.tracking.mlflow_mirror import replay
from bessemer.tracking.mlflow_store import page_of, resolve_uri
from bessemer.tracking.mlflow_transfer import open_experiment
from bessemer.tracking.search_journal import SearchTable, read_search
from bessemer.tracking.search_report import best_in_words, write_report
from bessemer.tracking.tables import with_error

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

__all__ = ["SearchMirror"]

_PARENT, _SEARCH = "mlflow.parentRunId", "bessemer.search_id"
_SECONDS = 20.0
_MOST_PARAM = 500
_MOST_NOTE = 4500
"""Characters of a description; MLflow's limit was 5000, and has risen since."""
_MOST_CELL = 60
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
        self._sent: dict[str, tuple[float, int, bool, bool]] = {}
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
            self._transfer(over)
            self.problem = None
        except Exception as e:  # tracking may fail; the search goes on
            if self.problem is None:
                _log.warning("MLflow: %s; the search goes on, and its directory has everything", e)
            self.problem = str(e)

    def _transfer(self, over: bool) -> None:
        search, table = load_search(self._directory / "search.yaml"), read_search(self._directory)
        client, experiment = open_experiment(self._uri, self._spec.experiment, self._directory.parent)
        parent = self._parent(client, experiment, search.name)
        for trial in table.trials.values():
            for run in self._runs(trial.name):
                far = (trial.kimg, trial.retries, trial.is_over, trial.final is not None)
                if not (run / "run.json").is_file() or self._sent.get(run.name) == far:
                    continue
                child = replay(run, self._spec, self._directory.parent)
                client.set_tag(child, _PARENT, parent)
                client.set_tag(child, "bessemer.trial", trial.state)
                self._sent[run.name] = far
        client.log_batch(parent, metrics=_metrics(search, table)[-1000:])
        report = write_report(self._directory)
        runs = {row["trial"]: self._mlflow_runs(row["trial"]) for row in report["trials"]}
        client.log_text(parent, _csv(report["trials"], runs), "trials.csv")
        names = ("search.yaml", "search.jsonl", "report.html", "report.json")
        for path in (*(self._directory / name for name in names), *self._pictures(report)):
            client.log_artifact(parent, str(path))
        page = page_of(self._uri) if self._uri.startswith("http") else ""
        links = {name: _links(page, found) for name, found in runs.items()}
        best = _linked(best_in_words(search, table) or "nobody yet", links)
        client.set_tag(parent, "mlflow.note.content", "\n".join([f"Best: {best}.", "", *_table(report, links)]))
        if over:
            client.set_terminated(parent, "FINISHED" if table.ended else "KILLED")

    def _runs(self, trial: str) -> list[Path]:
        """Run directories of a trial, one for each seed."""
        return [self._directory / "trials" / trial, *sorted((self._directory / "trials").glob(f"{trial}-seed*"))]

    def _mlflow_runs(self, trial: str) -> list[tuple[str, str]]:
        """Experiment and id of each of a trial's runs that MLflow has."""
        known = [read_json(run / _STATE) or {} for run in self._runs(trial)]
        return [
            (str(one["experiment_id"]), str(one["run_id"])) for one in known if {"experiment_id", "run_id"} <= set(one)
        ]

    def _pictures(self, report: dict[str, Any]) -> list[Path]:
        """The pictures of the search, drawn anew where something happened since the last time."""
        said = int(report["journal_bytes"])
        if said != self._drawn[0]:
            from bessemer.tracking.search_figures import draw_pictures

            self._drawn = said, draw_pictures(self._directory, report)
        return self._drawn[1]

    def _parent(self, client: MlflowClient, experiment: str, name: str) -> str:
        """Id of the search's own run, which is made once."""
        known = read_json(self._directory / _STATE) or {}
        if "run" in known:
            client.update_run(str(known["run"]), "RUNNING")
            return str(known["run"])
        identity = (read_json(self._directory / "search.json") or {}).get("id", "")
        found = client.search_runs([experiment], f"tags.`{_SEARCH}` = '{identity}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, run_name=name, tags={_SEARCH: identity})
        for field, value in _parameters(self._directory).items():
            client.log_param(run.info.run_id, field, value)
        state = json.dumps({"run": run.info.run_id})
        write_atomically(self._directory / _STATE, lambda file: file.write(state.encode()))
        return str(run.info.run_id)


def _metrics(search: SearchSpec, table: SearchTable) -> list[Metric]:
    """The best value of the last rung over time, that of the final, and how many trials there are."""
    from mlflow.entities import Metric

    sign = -1.0 if search.objective.mode == "max" else 1.0
    finals = sorted(
        (r for t in table.trials.values() for r in t.results if r.rung == len(search.objective.rungs_kimg) - 1),
        key=lambda result: result.time,
    )
    best, points = math.inf, []
    for number, result in enumerate(finals):
        best = min(best, sign * result.value)
        points.append(Metric(f"best/{search.objective.metric}", sign * best, int(result.time * 1000), number))
    winner, now = table.best(search.objective.mode), int(time.time() * 1000)
    final = winner.final.value if winner is not None and winner.final is not None else None
    if table.final is not None and table.final_is_over and final is not None:
        points.append(Metric(f"final/{table.final.metric}", final, now, 0))
    points.append(Metric("trials", len(table.trials), int(1000 * (table.seconds or 1)), 0))
    return points


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


def _links(page: str, runs: list[tuple[str, str]]) -> list[str]:
    """Where MLflow's page shows these runs; without a server's address, from any page of the one that shows them."""
    return [f"{page}#/experiments/{experiment}/runs/{run}" for experiment, run in runs]


def _linked(words: str, links: Mapping[str, list[str]]) -> str:
    """Words that begin with the name of a trial, with a link: MLflow folds the table, and this line stays."""
    name = words.partition(" ")[0]
    return f"[{name}]({links[name][0]}){words.removeprefix(name)}" if links.get(name) else words


def _table(report: Mapping[str, Any], links: Mapping[str, list[str]]) -> list[str]:
    """The trials as Markdown, best first, as many as MLflow takes."""
    final, fields = report["final"], sorted({field for row in report["trials"] for field in row["point"]})
    columns = ["trial", "state", *([f"final {final['metric']}"] if final else []), report["metric"], "kimg", *fields]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    room = _MOST_NOTE - sum(map(len, lines))
    for index, row in enumerate(report["trials"]):
        found = links[row["trial"]]
        name = row["trial"] if not found else f"[{row['trial']}]({found[0]})"
        name += "".join(f" [{number}]({link})" for number, link in enumerate(found[1:], 2))
        worth = [with_error(row["final"], row["final_standard_error"])] if final else []
        worth.append(with_error(row["value"], row["standard_error"]))
        cells = [name, row["state"], *worth, f"{row['kimg']:g}", *(_cell(row["point"].get(field)) for field in fields)]
        lines.append("| " + " | ".join(cells) + " |")
        room -= len(lines[-1]) + 1
        if room < 0:
            lines[-1] = f"\n{len(report['trials']) - index} more are in trials.csv."
            break
    return lines


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|")[:_MOST_CELL]


def _csv(rows: list[dict[str, Any]], runs: Mapping[str, list[tuple[str, str]]]) -> str:
    fields = sorted({field for row in rows for field in row["point"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = ["trial", "state", "kimg", "value", "standard_error", "final", "final_standard_error", "device_hours"]
    writer.writerow([*plain, *fields, "mlflow_run"])
    for row in rows:
        found = " ".join(run for _, run in runs[row["trial"]])
        writer.writerow([*(row[name] for name in plain), *(row["point"].get(field, "") for field in fields), found])
    return out.getvalue()
