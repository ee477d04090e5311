"""Complete checkpoints on their way to a store, in a thread of the first worker. Training never waits for them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from bessemer.errors import BessemerError, CheckpointError, StoreError
from bessemer.files import write_atomically
from bessemer.spec.job import CheckpointSpec
from bessemer.training.checkpoint_files import kimg_name
from bessemer.training.remote_checkpoints import RemoteCheckpoints
from bessemer.training.retention import expendable

__all__ = ["LAST_UPLOAD_SECONDS", "Uploads"]

LAST_UPLOAD_SECONDS = 3600.0
"""How long a run that reached its end waits for its last upload, which ends by itself when the store gives up."""

_log = logging.getLogger(__name__)

_WENT_BACK = ".went-back.json"


class Uploads:
    """Copies checkpoints to a store, one at a time, the newest first. Threads may share it.

    The first worker reads the files of all: workers share the run's directory.

    Args:
        remote: where to.
        root: directory of the local checkpoints.
        spec: which are kept there; the same rules as here.
        run: the run's directory, whose job, record and journal go along.
        scores: images seen -> value of the metric `keep_best`, lower is better.
        undecided: images seen where that value is yet to come.
    """

    def __init__(
        self,
        remote: RemoteCheckpoints,
        root: Path,
        spec: CheckpointSpec,
        run: Path,
        scores: Callable[[], Mapping[int, float]] = dict,
        undecided: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.remote, self._root, self._spec = remote, root, spec
        self._scores, self._undecided = scores, undecided
        self._record = run / "run.json"
        self._beside = [run / "job.yaml", self._record, run / "journal.jsonl"]
        self._changed = threading.Condition()
        self._pending: Path | None = None
        self._current: Path | None = None
        self._withdrawn = False
        """Whether the run went back to before the checkpoint that is being uploaded."""
        self._failed: Path | None = None
        self._went_back = self._left_behind()
        self._events: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None

    # What the run does. None of it waits.

    def due(self, path: Path) -> None:
        """Upload a checkpoint that became complete. One that still waits for its turn gives way to it."""
        with self._changed:
            if self._pending not in (None, path):
                assert self._pending is not None
                self._events.append(
                    {
                        "event": "upload_skipped",
                        "path": self._pending.name,
                        "reason": f"{path.name} was due before {self._pending.name} had its turn",
                    }
                )
            self._pending, self._failed = path, None
            if self._thread is None:
                # A daemon: a worker that is told to end does not wait for a store that hangs.
                self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def needed(self) -> set[Path]:
        """Local checkpoints that must not be deleted yet."""
        with self._changed:
            return {path for path in (self._pending, self._current) if path is not None}

    def forget_after(self, nimg: int) -> None:
        """The run went back to `nimg` and takes another way: what lies beyond must not be resumed from."""
        with self._changed:
            self._went_back = nimg
            if self._pending is not None and self._pending.name > kimg_name(nimg):
                self._pending = None
            if self._failed is not None and self._failed.name > kimg_name(nimg):
                self._failed = None
            self._withdrawn = self._current is not None and self._current.name > kimg_name(nimg)
            self._changed.notify_all()
        try:
            # On the disk too: if the store is out of reach, and then this process ends, the next one must know.
            write_atomically(self._root / _WENT_BACK, lambda f: f.write(json.dumps({"nimg": nimg}).encode()))
        except OSError:
            _log.exception("the store keeps checkpoints that the run went back from, until the next upload")

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call, as fields of journal events."""
        with self._changed:
            events, self._events = self._events, []
        return events

    def wait(self, seconds: float) -> None:
        """Wait until nothing is left to upload. What failed last is tried once more."""
        deadline = time.monotonic() + seconds
        if self._failed is not None:
            self.due(self._failed)
        with self._changed:
            while self._pending is not None or self._current is not None:
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    late = self._current or self._pending
                    assert late is not None
                    reason = f"the run ended {seconds:g} s after it was written, and did not wait longer"
                    self._events.append({"event": "upload_failed", "path": late.name, "reason": reason})
                    return

    # What the thread does.

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._pending is None:
                    self._changed.wait()
                path = self._current = self._pending
                self._pending, self._withdrawn = None, False
            event = self._upload(path)
            with self._changed:
                self._current = None
                if event is not None:
                    self._events.append(event)
                    if event["event"] == "upload_failed" and self._pending is None:
                        self._failed = path
                self._changed.notify_all()

    def _upload(self, path: Path) -> dict[str, Any] | None:
        """Upload one; the event that says how it went, if there is something to say."""
        began = time.monotonic()
        try:
            self._drop_left_behind()
            sent = self.remote.upload(path, self._beside, lambda: not self._withdrawn)
        except Exception as e:
            if self._withdrawn:
                return None
            if not isinstance(e, BessemerError):
                _log.exception("uploading %s failed", path)
            reason = str(e) if isinstance(e, BessemerError) else f"{type(e).__name__}: {e}"
            return {"event": "upload_failed", "path": path.name, "reason": reason}
        self._retain(path)
        if sent == 0:  # was there already
            return None
        seconds = round(time.monotonic() - began, 4)
        where = self.remote.shown(path.name)
        return {"event": "uploaded", "path": path.name, "url": where, "bytes": sent, "seconds": seconds}

    def _left_behind(self) -> int | None:
        try:
            return int(json.loads((self._root / _WENT_BACK).read_text())["nimg"])
        except FileNotFoundError:
            return None

    def _drop_left_behind(self) -> None:
        """Delete from the store what the run went back from."""
        with self._changed:
            nimg = self._went_back
        if nimg is None:
            return
        for name in self.remote.listing():
            if name > kimg_name(nimg):
                self.remote.delete(name)
        with self._changed:
            if self._went_back == nimg:
                self._went_back = None
                (self._root / _WENT_BACK).unlink(missing_ok=True)

    def _retain(self, newest: Path) -> None:
        """Delete from the store what no policy wants, and what is not complete and never will be."""
        try:
            found = self.remote.names()
            sound, last = [Path(name) for name in found], Path(newest.name)
            unwanted = expendable(sound, last, self._spec, self._scores(), self._undecided())
            for name in [path.name for path in unwanted] + [n for n in self.remote.listing() if n not in found]:
                self.remote.delete(name)
        except Exception:
            _log.exception("old checkpoints could not be deleted from %s", self.remote.store.name)

    # What a start does.

    def fetch_newer(self, local: Path | None, latest: int | None) -> tuple[Path | None, list[str]]:
        """Bring the newest undamaged checkpoint from the store, if it is newer than what is here.

        Args:
            local: the newest undamaged one that is here.
            latest: images; newer ones are left out.

        Returns:
            The better of both, and what is wrong with newer ones in the store.

        Raises:
            RunError: the store holds another run's.
            CheckpointError: the store is out of reach and nothing is here, so that nobody can say where the run stands.
        """
        wrong: list[str] = []
        limits = [nimg for nimg in (latest, self._went_back) if nimg is not None]
        try:
            self.remote.check_owner(self._record)
            for name in reversed(self.remote.names()):
                if limits and name > kimg_name(min(limits)):
                    continue
                if local is not None and name <= local.name:
                    break
                try:
                    return self.remote.fetch(name, self._root), wrong
                except CheckpointError as e:
                    wrong.append(str(e))
        except (StoreError, OSError) as e:
            if local is None:
                raise CheckpointError(
                    f"{e} No checkpoint is here either, so nobody can say where the run stands: resume it when the "
                    "store answers again, or start a new run."
                ) from None
            wrong.append(f"checkpoints in the store were not looked at: {e}")
        if local is not None:
            self.due(local)
        return local, wrong
