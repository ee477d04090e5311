"""Being asked to stop: by a signal to this process, or by the driver through a file that all workers can see.

A cluster that takes a machine back sends SIGTERM and some time later SIGKILL. Between the two, the workers finish
their iteration, agree to stop, and write a checkpoint.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

__all__ = ["EXIT_STOPPED", "STOPPED_LINE", "StopRequest"]

EXIT_STOPPED = 75
"""Exit code of a process that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "try again"."""

STOPPED_LINE = "stopped by SIGTERM, after a checkpoint"
"""What a driver prints at the end after its workers have written a checkpoint."""

_LOOK_SECONDS = 0.5


class StopRequest:
    """Whether this worker was asked to stop. Call it to find out: it costs nothing.

    Args:
        files: each stands for a request as soon as it exists.
    """

    def __init__(self, *files: Path) -> None:
        self._files, self._looked = files, 0.0
        self._asked = False

    def __call__(self) -> bool:
        # The files may lie on a network: one look now and then.
        if self._files and not self._asked and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._asked = any(file.exists() for file in self._files)
        return self._asked

    def listen(self) -> None:
        """Take SIGTERM as a request from now on, however often it comes. Only the main thread of a process may."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._asked = True
