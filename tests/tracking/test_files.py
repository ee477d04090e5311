"""Locks, and paths that stay inside."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from bessemer.errors import RunError
from bessemer.tracking.files import hold_lock, is_locked, path_inside, read_json


def test_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not is_locked(lock)
    with hold_lock(lock):
        assert is_locked(lock)
        with pytest.raises(RunError, match="another process holds"), hold_lock(lock):
            pass
    assert not is_locked(lock)
    with hold_lock(lock):
        pass


def _hold_and_die(path: str, ready: object) -> None:
    with hold_lock(Path(path)):
        ready.set()  # type: ignore[attr-defined]
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.multiprocess
def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold_and_die, args=(str(tmp_path / "lock"), ready))
    process.start()
    assert ready.wait(60)
    process.join(60)
    assert process.exitcode == -9
    assert not is_locked(tmp_path / "lock")


def test_paths_stay_inside(tmp_path: Path) -> None:
    inside = tmp_path / "run"
    (inside / "samples").mkdir(parents=True)
    (inside / "samples" / "a.png").touch()
    (tmp_path / "secret.png").touch()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "loop").symlink_to(inside / "loop")
    assert path_inside(inside, "samples/a.png") == (inside / "samples" / "a.png").resolve()
    assert path_inside(inside, "samples/../samples/a.png") is not None
    for outside in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "loop",
        "samples",
        "",
        "a\0b",
        "x" * 5000,
        None,
        3,
        ["samples/a.png"],
    ):
        assert path_inside(inside, outside) is None


def test_read_json_takes_objects_only(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_json(path) is None
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        assert read_json(path) is None
    path.write_bytes(b'{"a": 1}')
    assert read_json(path) == {"a": 1}
