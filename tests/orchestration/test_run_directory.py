"""One run, one trainer."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from bessemer.errors import RunError
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.tracking.files import RUN_LOCK, is_locked


def test_a_run_is_trained_by_one_process(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.locked():
        assert is_locked(tmp_path / RUN_LOCK)
        with pytest.raises(RunError, match=rf"is being trained by process {os.getpid()}; wait"), run.locked():
            pass
    assert not is_locked(tmp_path / RUN_LOCK)
    with run.locked():
        pass


def test_a_look_at_the_lock_does_not_keep_the_trainer_out(tmp_path: Path) -> None:
    """`bessemer runs` takes the lock for a moment to see whether anybody holds it."""
    descriptor = os.open(tmp_path / RUN_LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.2, os.close, [descriptor]).start()
    with RunDirectory(tmp_path).locked():
        assert is_locked(tmp_path / RUN_LOCK)
