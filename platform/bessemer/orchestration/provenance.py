"""Where a run comes from: commit, changes that were not committed, and the versions of all packages.

Kept for every start of a run, because a run may be resumed from other code than it began with, and from another
machine than the one that trains it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bessemer import __version__
from bessemer.errors import RunError

__all__ = ["MOST_DIFF_BYTES", "Provenance"]

MOST_DIFF_BYTES = 1 << 20
"""Longer changes are cut here: a run directory is no place for a data set that was not committed."""

_PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "mlflow", "numpy")
_GIT_SECONDS = 10.0
_RECORD, _DIFF, _LOCK = "provenance.json", "changes.diff", "lock.txt"


@dataclass(frozen=True)
class Provenance:
    """What one start of a run was made of."""

    record: Mapping[str, Any]
    """Versions, command, and what git says of the working directory."""
    diff: bytes
    """Changes since the commit, new Python files included; cut at :data:`MOST_DIFF_BYTES`."""
    lock: str
    """All installed packages, `name==version`, one a line."""

    @classmethod
    def here(cls) -> Provenance:
        """Of this process: its working directory, command and packages."""
        versions = _versions()
        git, diff = _git()
        record = {
            "bessemer": __version__,
            "python": sys.version.split()[0],
            "packages": {name: versions[name] for name in _PACKAGES if name in versions},
            "command": sys.argv,
            **git,
        }
        return cls(record, diff, "".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))

    @classmethod
    def read(cls, directory: Path) -> Provenance:
        """What :meth:`write` wrote.

        Raises:
            RunError: it is not there, or damaged.
        """
        try:
            record = json.loads((directory / _RECORD).read_text())
            return cls(record, (directory / _DIFF).read_bytes(), (directory / _LOCK).read_text())
        except (OSError, ValueError) as e:
            raise RunError(
                f"{directory}: holds not what `bessemer submit` sends: {_RECORD}, {_DIFF}, {_LOCK} ({e})."
            ) from None

    def write(self, directory: Path) -> None:
        """Write provenance.json, changes.diff and lock.txt into `directory`."""
        (directory / _RECORD).write_text(json.dumps(dict(self.record), indent=2) + "\n")
        (directory / _DIFF).write_bytes(self.diff)
        (directory / _LOCK).write_text(self.lock)

    def differences_here(self) -> dict[str, tuple[str | None, str | None]]:
        """Versions that differ from this process's, of what decides about numbers: name -> (here, in the record)."""
        installed = _versions()
        here: dict[str, str | None] = {name: installed.get(name) for name in _PACKAGES}
        there: dict[str, str | None] = {name: self.record["packages"].get(name) for name in _PACKAGES}
        here["python"], there["python"] = sys.version.split()[0], self.record["python"]
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}


def _versions() -> dict[str, str]:
    found = ((package.metadata["Name"], package.version) for package in metadata.distributions())
    return {name.lower(): version for name, version in found if name}


def _git() -> tuple[dict[str, Any], bytes]:
    """Commit of the working directory and its changes; nothing outside a repository."""

    def git(*arguments: str, **env: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
            env={**os.environ, **env},
        ).stdout.strip()

    try:
        record: dict[str, Any] = {"git_sha": git("rev-parse", "HEAD")}
        record["git_dirty"] = bool(git("status", "--porcelain"))
        if not record["git_dirty"]:
            return record, b""
        new = git("ls-files", "--others", "--exclude-standard", "-z", "--full-name", ":/*.py").split("\0")
        with tempfile.TemporaryDirectory() as aside:
            # A copy of the index, in which new files are known: `git diff` shows them, and nothing of the person's
            # repository changes.
            index = Path(aside) / "index"
            shutil.copyfile(git("rev-parse", "--path-format=absolute", "--git-path", "index"), index)
            if files := [f":/{name}" for name in new if name]:
                git("add", "--intent-to-add", "--", *files, GIT_INDEX_FILE=str(index))
            diff, whole = _diff(index)
    except (OSError, subprocess.SubprocessError):
        return {}, b""
    record["git_diff"] = {"bytes": len(diff), "whole": whole}
    return record, diff


def _diff(index: Path) -> tuple[bytes, bool]:
    """Changes since the commit, and whether these are all."""
    process = subprocess.Popen(
        ["git", "diff", "--no-color", "--no-ext-diff", "HEAD", "--"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GIT_INDEX_FILE": str(index)},
    )
    with process:
        assert process.stdout is not None
        diff = process.stdout.read(MOST_DIFF_BYTES + 1)
        process.kill()  # what is beyond is not read
    return diff[:MOST_DIFF_BYTES], len(diff) <= MOST_DIFF_BYTES
