"""The directory of a search: its file, its job, its journal and the runs of its trials, and the lock of its driver."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from bessemer.errors import RunError
from bessemer.orchestration.provenance import Provenance
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job, load_job
from bessemer.spec.search import SearchSpec
from bessemer.spec.search_load import dump_search, load_search
from bessemer.tracking.files import hold_lock
from bessemer.tracking.journal import Journal
from bessemer.tracking.runs import load_run
from bessemer.tracking.search_journal import SEARCH_LOCK, Trial, trial_name

__all__ = ["SearchDirectory"]


class SearchDirectory:
    """``searches/<name>/``: search.yaml, job.yaml, original.yaml, search.json, search.jsonl, provenance/, trials/."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def create(cls, path: Path, search: SearchSpec, base: JobSpec, original: JobSpec) -> SearchDirectory:
        """Make the directory of a new search.

        Args:
            path: of the directory.
            search: the search.
            base: its job, as :func:`bessemer.spec.search_load.load_base` gives it, with absolute paths.
            original: the job that the search file names, as it is.

        Raises:
            RunError: it exists already, or cannot be written.
        """
        directory = cls(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            (path / "trials").mkdir()
            (path / "provenance").mkdir()
            Provenance.here().write(path / "provenance")
            (path / "original.yaml").write_text(dump_job(original))
            (path / "job.yaml").write_text(dump_job(base))
            (path / "search.yaml").write_text(dump_search(search))
            # search.json comes last: a directory without it is no search
            record = {"id": uuid.uuid4().hex, "name": search.name, "created": time.time()}
            (path / "search.json").write_text(json.dumps(record, indent=2) + "\n")
        except FileExistsError:
            raise RunError(
                f"{path}: exists already; choose another --dir, or go on with it: bessemer search resume {path}"
            ) from None
        except OSError as e:
            raise RunError(f"{path}: cannot be written ({e.strerror}); choose another place with --dir.") from None
        return directory

    @classmethod
    def open(cls, path: Path) -> SearchDirectory:
        """An existing search, by its directory or by its name below `searches/`.

        Raises:
            RunError: there is none.
        """
        for found in (path, Path("searches") / path):
            if (found / "search.json").is_file():
                return cls(found)
        raise RunError(f"{path}: is no directory of a search (search.json is expected there), nor is searches/{path}.")

    @cached_property
    def search(self) -> SearchSpec:
        """The search as it was when it was made."""
        return load_search(self.path / "search.yaml")

    @cached_property
    def base(self) -> JobSpec:
        """The job that is varied, with what all trials have in common."""
        return load_job(self.path / "job.yaml")

    @cached_property
    def original(self) -> JobSpec:
        """The job as the search found it."""
        return load_job(self.path / "original.yaml")

    @cached_property
    def provenance(self) -> Provenance:
        """Of whoever began the search."""
        return Provenance.read(self.path / "provenance")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds with which each point is trained."""
        return self.search.seeds or (self.base.seed,)

    def run_path(self, number: int, index: int) -> Path:
        """Run directory of a trial for the seed at `index`."""
        suffix = "" if len(self.seeds) == 1 else f"-seed{self.seeds[index]}"
        return self.path / "trials" / f"{trial_name(number)}{suffix}"

    def leave_last_word(self, trial: Trial) -> None:
        """Let the runs of a trial that is over say so in their own journals, as other runs do, unless they have."""
        if not trial.is_over:
            return
        for path in (self.run_path(trial.number, index) for index in range(len(self.seeds))):
            if not (path / "run.json").is_file():
                continue
            run = load_run(path, newest=1)
            if run.last_word is not None:
                continue
            nimg = max((record["nimg"] for record in run.records), default=0)
            fields = (
                {"event": "failed", "error": trial.reason}
                if trial.state == "failed"
                else {"event": "stopped", "reason": trial.reason or "the search stopped it: others were better"}
            )
            Journal(path / "journal.jsonl").write("event", nimg, **fields)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the search for this process; the lock goes away with the process, however it ends.

        Raises:
            RunError: another process drives this search.
        """
        with ExitStack() as held:
            try:
                held.enter_context(hold_lock(self.path / SEARCH_LOCK))
            except RunError:
                raise RunError(f"{self.path}: goes on in another process; wait for it, or end that first.") from None
            yield

    def forget_sessions(self) -> None:
        """Delete what Ray Tune wrote: the journal knows all of it."""
        shutil.rmtree(self.path / "tune", ignore_errors=True)
