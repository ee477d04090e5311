"""All runs of a store, quickly: the row of each is kept until one of its files changes.

The rows are derived, and the journals are what counts: a row is made again as soon as size or time of job.yaml,
run.json or journal.jsonl differ from those it was made from. They lie in the person's own cache, so that a store can be
read-only, and a directory from elsewhere cannot bring rows of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bessemer import __version__
from bessemer.errors import RunError
from bessemer.files import cache_dir, write_atomically
from bessemer.tracking.files import read_json
from bessemer.tracking.runs import state_of
from bessemer.tracking.summary import RunSummary, read_summary

__all__ = ["RunIndex", "list_runs"]

_FILES = ("job.yaml", "run.json", "journal.jsonl")
_FORMAT = f"2 {__version__}"

Stamp = list[list[int]]


class RunIndex:
    """Rows of the runs directly below `root`. One instance may be used by several threads.

    Args:
        root: the store.
        cache: directory of the kept rows; ``<BESSEMER_CACHE or ~/.cache/bessemer>/runs`` if not given.
    """

    def __init__(self, root: str | Path, cache: Path | None = None) -> None:
        self.root = Path(root)
        name = hashlib.sha256(str(self.root.absolute()).encode("utf-8", errors="surrogateescape")).hexdigest()[:24]
        self._file = (cache or cache_dir() / "runs") / f"{name}.json"
        self._rows: dict[str, tuple[Stamp, RunSummary]] | None = None
        self._lock = threading.Lock()

    def rows(self) -> list[RunSummary]:
        """All runs, newest first; broken directories last, each with a note.

        Directories that hold no file of a run (MLflow's artifacts, for one) are left out.

        Raises:
            RunError: the store is no directory or cannot be read.
        """
        with self._lock:
            known = self._kept() if self._rows is None else self._rows
            found: dict[str, tuple[Stamp, RunSummary]] = {}
            changed = False
            for path, stamp in self._directories():
                entry = known.get(path.name)
                if entry is None or entry[0] != stamp:
                    row = read_summary(path)
                    if row is None:
                        continue
                    entry, changed = (stamp, row), True
                found[path.name] = entry
            self._rows = found
            if changed or found.keys() != known.keys():
                self._keep(found)
        rows = [_as_of_now(row) for _, row in found.values()]
        return sorted(rows, key=lambda row: (row.state == "broken", -(row.created or 0.0), row.name))

    def kept_rows(self) -> list[RunSummary]:
        """What was known when the store was last looked at; at once, and possibly nothing."""
        known = self._rows if self._rows is not None else self._kept()
        rows = [_as_of_now(row) for _, row in known.values()]
        return sorted(rows, key=lambda row: (row.state == "broken", -(row.created or 0.0), row.name))

    def _directories(self) -> Iterator[tuple[Path, Stamp]]:
        try:
            with os.scandir(self.root) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        except OSError as error:
            raise RunError(
                f"{self.root}: cannot be listed ({error.strerror}); give the directory that holds the runs with --root"
            ) from error
        for name in names:
            yield self.root / name, [_stamp(os.path.join(self.root, name, file)) for file in _FILES]  # noqa: PTH118  # 1500 stats

    def _kept(self) -> dict[str, tuple[Stamp, RunSummary]]:
        kept = read_json(self._file) or {}
        if kept.get("format") != _FORMAT or kept.get("root") != str(self.root.absolute()):
            return {}
        try:
            return {name: (stamp, self._placed(name, row)) for name, (stamp, row) in kept["rows"].items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            return {}

    def _placed(self, name: str, row: dict[str, object]) -> RunSummary:
        """A kept row, with the path as it is written this time."""
        return replace(RunSummary.from_dict(row), path=str(self.root / name))

    def _keep(self, rows: dict[str, tuple[Stamp, RunSummary]]) -> None:
        content = {name: (stamp, row.as_dict()) for name, (stamp, row) in rows.items()}
        page = json.dumps({"format": _FORMAT, "root": str(self.root.absolute()), "rows": content}).encode()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, lambda file: file.write(page))
        except OSError:
            pass  # the next look is slow again, and no less true


def list_runs(root: str | Path) -> list[RunSummary]:
    """All runs directly below `root`, as :meth:`RunIndex.rows` gives them.

    Raises:
        RunError: `root` is no directory or cannot be read.
    """
    return RunIndex(root).rows()


def _stamp(path: str) -> list[int]:
    try:
        found = os.stat(path)  # noqa: PTH116  # a third of pathlib's time
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _as_of_now(row: RunSummary) -> RunSummary:
    """The row with the state of this moment: locks and silence are in no journal."""
    if row.state == "broken" or row.last_word is not None:
        return row
    return replace(row, state=state_of(Path(row.path), row.last_word, row.newest))
