"""One checkpoint on its way to the disk, as one worker sees it.

A thread copies the state to host memory, while training goes on until it would change that state: forward and
backward passes run meanwhile, the optimizer waits (Mohan et al., CheckFreq, FAST 2021, section 4.1). The thread then
writes this worker's file, and leaves a note of what it holds. When all workers have done so, which they tell each
other through the loop's pulse, the first worker collects the notes, writes the manifest, and renames the directory.
No thread but the main one ever enters a collective call: what two threads of one worker send could meet in a
different order on another.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.files import sync
from bessemer.training.checkpoint_files import FORMAT, MANIFEST, SHARED, STATE, write_json
from bessemer.training.host_copy import HostCopy

__all__ = ["SaveReport", "Saving", "reason"]

_log = logging.getLogger(__name__)


class SaveReport(NamedTuple):
    """How saving ended."""

    name: str
    """Name of the checkpoint's directory."""
    error: str | None
    """Why there is no such checkpoint, with the file's name; None if all went well."""
    stall: float
    """Seconds that training waited: to begin, and for the copy."""
    seconds: float
    """Seconds from the beginning to the rename."""

    def event(self) -> dict[str, Any]:
        """Fields of the journal's event."""
        how = {"path": self.name, "stall_s": round(self.stall, 4), "seconds": round(self.seconds, 4)}
        if self.error is None:
            return {"event": "checkpoint", **how}
        return {"event": "checkpoint_failed", "reason": self.error, **how}


def reason(error: BaseException) -> str:
    """An error in one line, beginning with the file's name where there is one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


class _Task:
    """A function in a thread, and how it ended."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self.error: str | None = None
        self.ended = 0.0
        # A daemon: a worker that is told to end does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as e:
            _log.exception("saving a checkpoint failed")
            self.error = reason(e)
        self.ended = time.monotonic()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> str | None:
        """Wait for the end; the error, or None."""
        self._thread.join()
        return self.error


class Saving:
    """This worker's part of one checkpoint; on the first worker, also what completes it.

    Args:
        final: the checkpoint's directory.
        aside: the hidden directory that is filled and renamed.
        rank: this worker.
        size: number of workers.
        share: this worker's fragments, chosen and not yet copied.
        layout: fragment -> (first element, elements).
        shared: the buffers, chosen and not yet copied; on the first worker.
        state: what goes into `state.json`, less the places of the fragments; on the first worker.
        began: `time.monotonic()` when saving began.
    """

    def __init__(
        self,
        final: Path,
        aside: Path,
        rank: int,
        size: int,
        share: HostCopy,
        layout: Mapping[str, tuple[int, int]],
        shared: HostCopy | None,
        state: Mapping[str, Any] | None,
        began: float,
    ) -> None:
        self.final, self._aside, self._rank, self._size = final, aside, rank, size
        self._share, self._layout, self._shared, self._state = share, layout, shared, state
        self._began = began
        self._reported = False
        self._commit: _Task | None = None
        self._copied = threading.Event()
        self._writing = _Task(self._copy_and_write, "checkpoint")
        self._stall = time.monotonic() - began

    @staticmethod
    def _names(rank: int) -> tuple[str, str]:
        """File and note of a worker."""
        return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"

    def _copy_and_write(self) -> None:
        try:
            self._share.copy()
            if self._shared is not None:
                self._shared.copy()
        finally:
            self._copied.set()
        file, note = self._names(self._rank)
        files = {file: self._share.write(self._aside / file)}
        if self._shared is not None:
            files[SHARED] = self._shared.write(self._aside / SHARED)
        write_json(self._aside / note, {"files": files, "layout": self._layout})

    def wait_for_copy(self) -> None:
        """Return when the state may change again."""
        if not self._copied.is_set():
            began = time.monotonic()
            self._copied.wait()
            self._stall += time.monotonic() - began

    @property
    def is_durable(self) -> bool:
        """Whether this worker's part is on the disk."""
        return self._writing.over and self._writing.error is None

    @property
    def has_failed(self) -> bool:
        return self._writing.error is not None

    @property
    def is_over(self) -> bool:
        """On the first worker: whether the checkpoint is complete, or cannot become so."""
        return self._commit is not None and self._commit.over

    def share_written(self) -> str | None:
        """Wait for this worker's part; the error, or None."""
        return self._writing.result()

    def commit(self, before: Callable[[], None], after: Callable[[Path], None]) -> None:
        """Begin to complete the checkpoint, on the first worker, when every worker's part is durable.

        Args:
            before: called first, and waited for.
            after: called with the complete checkpoint's directory, in the same thread.
        """
        if self._commit is None:
            self._commit = _Task(lambda: self._complete(before, after), "checkpoint-commit")

    def committed(self) -> str | None:
        """Wait for what :meth:`commit` began; the error, or None."""
        assert self._commit is not None
        return self._commit.result()

    def _complete(self, before: Callable[[], None], after: Callable[[Path], None]) -> None:
        before()
        where: dict[str, list[tuple[str, str, int, int]]] = {}
        files: dict[str, Any] = {}
        notes = []
        for rank in range(self._size):
            file, name = self._names(rank)
            notes.append(self._aside / name)
            note = json.loads(notes[-1].read_text())
            files |= note["files"]
            for key, (start, numel) in note["layout"].items():
                where.setdefault(key, []).append((file, key, start, numel))
        assert self._state is not None
        files[STATE] = write_json(self._aside / STATE, {**self._state, "fragments": where})
        for path in notes:
            path.unlink()
        write_json(self._aside / MANIFEST, {"format": FORMAT, "nimg": self._state["nimg"], "files": files}, indent=1)
        sync(self._aside)
        if self.final.exists():  # damaged, or a run went back to before it
            shutil.rmtree(self.final)
        os.rename(self._aside, self.final)  # noqa: PTH104  # an error with both names
        sync(self.final.parent)
        after(self.final)

    def report(self, error: str | None) -> list[SaveReport]:
        """How it ended, the first time that anybody asks."""
        if self._reported:
            return []
        self._reported = True
        if error is not None:
            shutil.rmtree(self._aside, ignore_errors=True)
        ended = self._commit.ended if self._commit is not None else time.monotonic()
        return [SaveReport(self.final.name, error, self._stall, ended - self._began)]
