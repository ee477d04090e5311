"""Going on with a run whose directory is lost, from what it left in its store."""

from __future__ import annotations

import shutil
from pathlib import Path

from bessemer.errors import RunError, StoreError
from bessemer.files import hidden_name
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job, load_job
from bessemer.stores.opening import open_store
from bessemer.stores.store import MissingObjectError, Store

__all__ = ["fetch_run", "restore_run"]


def restore_run(job: JobSpec, directory: Path) -> RunDirectory | None:
    """The run of this directory's name that went to `checkpoint.upload` of the job; None if there is none.

    Raises:
        StoreError: the store is out of reach.
    """
    upload = job.checkpoint.upload
    if upload is None:
        return None
    store = open_store(f"{upload.rstrip('/')}/{directory.absolute().name}")
    return _restore(store, upload, directory) if store.exists("run.json") else None


def fetch_run(url: str, root: Path) -> RunDirectory:
    """Make the directory of a run anew, from its place in a store: ``<checkpoint.upload>/<name of the run>``.

    Its checkpoints come when it goes on. What the store does not have (snapshots, sample grids, logs) is lost.

    Args:
        url: the run's place.
        root: directory that holds the runs here.

    Raises:
        RunError: there is no run, or a directory of its name is here already.
        StoreError: the store is out of reach.
    """
    upload, _, name = url.rstrip("/").rpartition("/")
    directory = root / name
    if directory.exists():
        raise RunError(f"{directory}: exists already; go on with it: bessemer resume {directory}")
    return _restore(open_store(url.rstrip("/")), upload, directory)


def _restore(store: Store, upload: str, directory: Path) -> RunDirectory:
    directory = directory.absolute()
    aside = hidden_name(directory)
    aside.mkdir(parents=True)
    try:
        for name in ("job.yaml", "journal.jsonl", "run.json"):
            with (aside / name).open("wb") as file:
                store.download(name, file)
        job = load_job(aside / "job.yaml")
        if job.checkpoint.upload != upload:  # the store was moved since
            checkpoint = job.checkpoint.model_copy(update={"upload": upload})
            (aside / "job.yaml").write_text(dump_job(job.model_copy(update={"checkpoint": checkpoint})))
        aside.rename(directory)
    except MissingObjectError as e:
        raise RunError(f"{store.name}: is no run: {e}") from None
    except OSError as e:
        raise StoreError(f"{directory}: cannot be restored from {store.name} ({e.strerror}).") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return RunDirectory.open(directory)
