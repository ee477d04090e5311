"""Finding the snapshot that a person means."""

from __future__ import annotations

from pathlib import Path

from bessemer.errors import RunError

__all__ = ["snapshot_directory"]


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
