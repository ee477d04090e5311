"""The run directory: everything that a run leaves behind, and the lock that keeps a second trainer out."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.errors import RunError
from bessemer.files import hidden_name
from bessemer.orchestration.provenance import Provenance
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job, load_job
from bessemer.tracking.files import RUN_LOCK, hold_lock
from bessemer.tracking.journal import Journal, read_journal

if TYPE_CHECKING:
    from bessemer.training.uploads import Uploads

__all__ = ["RunDirectory"]


def _unwritable(place: Path, error: OSError) -> RunError:
    return RunError(
        f"run directory {error.filename or place}: cannot be written ({error.strerror}); "
        "choose another place with --runs or --run-dir."
    )


class RunDirectory:
    """``runs/<name>/``: job.yaml, run.json, journal.jsonl, provenance/, checkpoints/, snapshots/, samples/, logs/."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check_root(root: Path) -> None:
        """Check that runs can be made below `root`, which is made if it is not there.

        Raises:
            RunError: it cannot be written.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError as e:
            raise _unwritable(root, e) from None

    @classmethod
    def create(
        cls, root: Path, job: JobSpec, directory: Path | None = None, provenance: Provenance | None = None
    ) -> RunDirectory:
        """Make the directory of a new run: `directory`, or the next free ``<root>/<job name>[-N]``.

        Args:
            root: where runs are made.
            job: the job.
            directory: of this run.
            provenance: of whoever wants the run, if that is not this process.

        Raises:
            RunError: it exists already, or cannot be written.
        """
        try:
            if directory is None:
                root.mkdir(parents=True, exist_ok=True)
                path = cls._next_free(root, job.name)
            else:
                directory.parent.mkdir(parents=True, exist_ok=True)
                directory.mkdir()
                path = directory
            path = path.absolute()
            provenance = provenance or Provenance.here()
            record = {"id": uuid.uuid4().hex, "name": path.name, "created": time.time(), **provenance.record}
            (path / "job.yaml").write_text(dump_job(job))
            run = cls(path)
            run.add_provenance(provenance)
            # run.json comes last: a directory without it is no run
            (path / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        except OSError as e:
            if directory is not None and directory.is_dir():
                raise RunError(
                    f"{directory}: exists already; choose another --run-dir, or go on with it: "
                    f"bessemer resume {directory}"
                ) from None
            raise _unwritable(directory or root, e) from None
        return run

    @staticmethod
    def _next_free(root: Path, name: str) -> Path:
        for number in range(1, 10_000):
            path = root / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
        raise RunError(f"{root}: already holds 9999 runs named {name}; delete some, or choose another --runs.")

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            RunError: `path` is no run directory.
        """
        path = path.absolute()
        if not (path / "run.json").is_file() or not (path / "job.yaml").is_file():
            raise RunError(
                f"{path}: is no run directory (run.json and job.yaml are expected there); `bessemer runs` lists runs."
            )
        return cls(path)

    def add_provenance(self, provenance: Provenance) -> None:
        """Keep where one more start of this run comes from, as ``provenance/1/``, ``provenance/2/``, ..."""
        root = self.path / "provenance"
        root.mkdir(exist_ok=True)
        directory = root / str(1 + sum(1 for _ in root.iterdir()))
        directory.mkdir()
        provenance.write(directory)

    @property
    def journal(self) -> Journal:
        return Journal(self.path / "journal.jsonl")

    def newest_nimg(self) -> int:
        """Images seen at the furthest record of the journal; 0 without one."""
        return max((int(record["nimg"]) for record in read_journal(self.journal.path)), default=0)

    @property
    def has_finished(self) -> bool:
        """Whether training came to its end."""
        return any(record.get("event") == "finished" for record in read_journal(self.journal.path))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def runs_root(self) -> Path:
        return self.path.parent

    def record(self) -> dict[str, Any]:
        """Who the run is: `id`, `name`, when and with which versions it was made."""
        found: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return found

    def uploads(
        self, scores: Callable[[], Mapping[int, float]], undecided: Callable[[], Collection[int]]
    ) -> Uploads | None:
        """What copies the run's checkpoints to `checkpoint.upload`; None where the job names no such place.

        Args:
            scores: images seen -> value of the metric `keep_best`.
            undecided: images seen where that value is yet to come.
        """
        from bessemer.training.remote_checkpoints import RemoteCheckpoints
        from bessemer.training.uploads import Uploads

        spec = self.job().checkpoint
        if spec.upload is None:
            return None
        remote = RemoteCheckpoints.of_run(spec.upload, self.record()["name"])
        return Uploads(remote, self.checkpoints, spec, self.path, scores, undecided)

    def job(self) -> JobSpec:
        """The job as it was when the run was made."""
        return load_job(self.path / "job.yaml")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes away with the process, however it ends.

        Raises:
            RunError: another process trains this run.
        """
        file = self.path / RUN_LOCK
        with ExitStack() as held:
            try:
                held.enter_context(hold_lock(file))
            except OSError as e:
                raise RunError(f"{file}: cannot be written ({e.strerror}); make the run directory writable.") from None
            except RunError:
                owner = file.read_text(errors="replace").strip()
                raise RunError(
                    f"{self.path}: is being trained by process {owner or '?'}; wait for it, or end that process first."
                ) from None
            file.write_text(str(os.getpid()))
            yield

    # A person's mistake ends a run for good: replacing workers would only repeat it. The first worker that finds
    # one leaves it here; workers that come after see it and stop, and the driver reports it.

    @property
    def _error_file(self) -> Path:
        return self.path / "error.json"

    def leave_error(self, error: Exception) -> None:
        """Record why the run cannot go on, unless somebody did already."""
        aside = hidden_name(self._error_file)
        aside.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))
        try:
            os.link(aside, self._error_file)  # unlike rename, fails if it exists: the first error is the cause
        except FileExistsError:
            pass
        finally:
            aside.unlink()

    def error(self) -> dict[str, str] | None:
        """What :meth:`leave_error` recorded since the last :meth:`clear_error`."""
        try:
            found: dict[str, str] = json.loads(self._error_file.read_text())
        except FileNotFoundError:
            return None
        return found

    def clear_error(self) -> None:
        self._error_file.unlink(missing_ok=True)

    # Workers on other machines cannot be signalled; they all see this file.

    @property
    def stop_file(self) -> Path:
        return self.path / ".stop"

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint and stop, wherever they are."""
        self.stop_file.touch()

    def clear_stop(self) -> None:
        self.stop_file.unlink(missing_ok=True)

    # The driver replaces the workers by more of them: the same, but not the end.

    @property
    def resize_file(self) -> Path:
        return self.path / ".resize"

    def request_resize(self) -> None:
        """Ask the workers to write a checkpoint and make room for a larger group."""
        self.resize_file.touch()

    def clear_resize(self) -> None:
        self.resize_file.unlink(missing_ok=True)

    @property
    def failures(self) -> Path:
        """Directory where workers of the current attempt leave how they failed."""
        return self.path / "logs" / "failures"
