"""Log files of a run's processes."""

from __future__ import annotations

import logging

from bessemer.orchestration.run_directory import RunDirectory

__all__ = ["log_to_file"]


def log_to_file(run: RunDirectory, who: str) -> None:
    """Send this process's log records to ``logs/<who>.log`` of the run."""
    directory = run.path / "logs"
    directory.mkdir(exist_ok=True)
    handler = logging.FileHandler(directory / f"{who}.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("bessemer")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
