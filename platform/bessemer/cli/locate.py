"""Finding the run and the snapshot that a person means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.errors import RunError, SpecError

if TYPE_CHECKING:
    from bessemer.systems.snapshot import SnapshotInfo

__all__ = ["RunArgument", "class_index", "run_directory", "snapshot_directory"]

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or the run's name below runs/.")]


def run_directory(run: str | Path) -> Path:
    """A run given by its directory, or by its name below `runs/`.

    Raises:
        RunError: there is no such run.
    """
    for path in (Path(run), Path("runs") / run):
        if (path / "run.json").is_file():
            return path
    raise RunError(f"{run}: is no run directory, and runs/{run} is none either; `bessemer runs` lists the runs.")


def snapshot_directory(run: Path, snapshot: str | None) -> Path:
    """A snapshot of a run: the newest, or one given by name (`kimg-000012.800`) or path.

    Raises:
        RunError: the run has no snapshot of this name.
        CheckpointError: the run has no snapshot at all.
    """
    from bessemer.systems.snapshot import newest_snapshot, snapshot_dirs

    newest = newest_snapshot(run)
    if snapshot is None:
        return newest
    for directory in (run / "snapshots" / snapshot, Path(snapshot)):
        if (directory / "snapshot.json").is_file():
            return directory
    names = [path.name for path in snapshot_dirs(run)]
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-3:]]
    raise RunError(f"--snapshot {snapshot}: {run} has no such snapshot; it has {', '.join(shown)}.")


def class_index(info: SnapshotInfo, name: str) -> int:
    """Index of the class of this name.

    Raises:
        SpecError: the data set that the snapshot was trained on has no such class.
    """
    names = info.class_names
    if name in names:
        return names.index(name)
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise SpecError(f"--class {name}: the data set has no such class.{hint} Classes: {shown or 'none'}.")
