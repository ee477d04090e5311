"""Checkpoints in a store: only whole ones count, and a run that lost everything else goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.servers import S3Server
from tests.training.forked import CONTEXT, free_port, start_group, wait_for_group
from tests.training.tiny_work import IMAGES, assert_same, events, train

from bessemer.errors import CheckpointError, RunError
from bessemer.spec.job import CheckpointSpec
from bessemer.stores.local import LocalStore
from bessemer.stores.opening import open_store
from bessemer.stores.store import Patience, Store
from bessemer.training.checkpoint_files import (
    FORMAT,
    MANIFEST,
    complete_checkpoints,
    delete_checkpoint,
    kimg_name,
    verify_checkpoint,
    write_json,
)
from bessemer.training.remote_checkpoints import RemoteCheckpoints
from bessemer.training.stopping import EXIT_STOPPED
from bessemer.training.uploads import Uploads

QUICK = Patience(attempts=1, pause=0.01, timeout=5)


def make_checkpoint(run: Path, nimg: int, seed: int = 0) -> Path:
    """A small checkpoint as saving leaves it."""
    path = run / "checkpoints" / kimg_name(nimg)
    path.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    files = {}
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "shared.safetensors"):
        files[name] = write_json(path / name, draws.integers(0, 1 << 30, 500).tolist())
    files["state.json"] = write_json(path / "state.json", {"nimg": nimg, "workers": 2, "zero_stage": {"g": 1}})
    write_json(path / MANIFEST, {"format": FORMAT, "nimg": nimg, "files": files})
    return path


class Run:
    """A run directory with checkpoints, and its place in a store."""

    def __init__(self, path: Path, store: Store, identity: str = "one", **policy: Any) -> None:
        self.path, self.store = path, store
        self.remote = RemoteCheckpoints(store)
        path.mkdir(exist_ok=True)
        write_json(path / "run.json", {"id": identity})
        spec = CheckpointSpec(**{"keep_last": 100} | policy)
        self.uploads = Uploads(self.remote, path / "checkpoints", spec, path)

    def save(self, nimg: int, seed: int = 0) -> Path:
        path = make_checkpoint(self.path, nimg, seed)
        self.uploads.due(path)
        return path

    def upload(self, nimg: int, seed: int = 0) -> list[dict[str, Any]]:
        """Save, wait, and say what happened."""
        self.save(nimg, seed)
        self.uploads.wait(30)
        return self.uploads.events()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", open_store(tmp_path / "store" / "run", QUICK))


def test_what_went_up_comes_down_again(s3: S3Server, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", open_store(f"{s3.url}/runs/mine"))
    path = make_checkpoint(run.path, 1000)
    (event,) = run.upload(2000, seed=1)
    assert (event["event"], event["path"]) == ("uploaded", kimg_name(2000))
    assert event["url"] == f"s3://bessemer-tests/runs/mine/checkpoints/{kimg_name(2000)}"
    assert event["bytes"] == sum(file.stat().st_size for file in (run.path / "checkpoints" / kimg_name(2000)).iterdir())
    run.uploads.due(path)
    run.uploads.wait(30)
    assert run.remote.names() == [kimg_name(1000), kimg_name(2000)]
    elsewhere = tmp_path / "elsewhere" / "checkpoints"
    for name in run.remote.names():
        fetched = run.remote.fetch(name, elsewhere)
        verify_checkpoint(fetched)
        for file in (run.path / "checkpoints" / name).iterdir():
            assert (fetched / file.name).read_bytes() == file.read_bytes()
    assert len(list(elsewhere.iterdir())) == 2
    run.uploads.events()
    run.uploads.due(path)  # is there: nothing is sent, nothing is said
    run.uploads.wait(30)
    assert run.uploads.events() == []


def test_what_is_not_complete_is_not_there(run: Run) -> None:
    """Uploading ends before any of its files: no checkpoint may be seen until the manifest is there."""
    path = make_checkpoint(run.path, 1000)
    for files in range(5):
        countdown = iter([True] * files)
        with pytest.raises(CheckpointError, match="not wanted"):
            run.remote.upload(path, is_wanted=lambda countdown=countdown: next(countdown, False))  # type: ignore[misc]
        assert run.remote.names() == []
    run.remote.upload(path)
    assert run.remote.names() == [path.name]
    # Replacing one by another takes it away first.
    delete_checkpoint(path)
    other = make_checkpoint(run.path, 1000, seed=5)
    countdown = iter([True] * 2)
    with pytest.raises(CheckpointError):
        run.remote.upload(other, is_wanted=lambda: next(countdown, False))
    assert run.remote.names() == []
    run.remote.upload(other)
    verify_checkpoint(run.remote.fetch(other.name, run.path.parent / "back"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            r"shared.safetensors: has \d+ bytes, the manifest says",
        ),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "shared.safetensors: sha256 differs"),
        (lambda file: file.unlink(), "shared.safetensors: is missing"),
        (lambda file: (file.parent / MANIFEST).write_text("{"), "manifest.json: cannot be read"),
        (
            lambda file: (file.parent / MANIFEST).write_text(
                json.dumps({"format": FORMAT, "files": {"../../x": {"bytes": 1, "sha256": ""}}})
            ),
            "manifest.json: cannot be read",
        ),
    ],
)
def test_a_damaged_one_is_skipped_by_name(run: Run, tmp_path: Path, harm: Callable[[Path], Any], message: str) -> None:
    run.upload(1000)
    run.upload(2000, seed=1)
    shutil.rmtree(run.path / "checkpoints")
    harm(tmp_path / "store" / "run" / "checkpoints" / kimg_name(2000) / "shared.safetensors")
    found, wrong = run.uploads.fetch_newer(None, None)
    assert found == run.path / "checkpoints" / kimg_name(1000)
    verify_checkpoint(found)
    (reason,) = wrong
    assert reason.startswith(f"{tmp_path}/store/run/checkpoints/{kimg_name(2000)}/")
    with pytest.raises(CheckpointError, match=message):
        run.remote.fetch(kimg_name(2000), tmp_path / "x")
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == [kimg_name(1000)]
    damage = {
        name: run.remote.describe(name, files, content=True).damage for name, files in run.remote.listing().items()
    }
    assert damage[kimg_name(1000)] is None
    assert damage[kimg_name(2000)] == reason


def test_only_what_is_newer_is_fetched(run: Run) -> None:
    old = run.path / "checkpoints" / kimg_name(1000)
    run.upload(1000)
    run.upload(2000)
    assert run.uploads.fetch_newer(old, None)[0] == old.with_name(kimg_name(2000))
    shutil.rmtree(old.with_name(kimg_name(2000)))
    assert run.uploads.fetch_newer(old, 1500)[0] == old
    newest = run.save(3000)
    run.uploads.wait(30)
    assert run.uploads.fetch_newer(newest, None) == (newest, [])


def test_the_rules_for_keeping_hold_in_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    run = Run(tmp_path / "run", store, keep_last=2, keep_every_kimg=3.0, every_kimg=1.0)
    left = make_checkpoint(tmp_path / "killed", 500)
    store.put(f"checkpoints/{left.name}/state.json", left / "state.json")  # what a killed upload leaves
    for kimg in range(1, 8):
        run.upload(kimg * 1000)
    assert run.remote.names() == [kimg_name(n * 1000) for n in (3, 6, 7)]
    assert list(run.remote.listing()) == run.remote.names()


class Gated(LocalStore):
    """A store that lets nothing in until it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), QUICK)
        self.gate, self.waiting = threading.Event(), threading.Event()

    def put(self, name: str, path: Path) -> None:
        self.waiting.set()
        assert self.gate.wait(30)
        super().put(name, path)


def test_the_newest_goes_first_when_the_store_is_slow(tmp_path: Path) -> None:
    store = Gated(tmp_path / "store")
    run = Run(tmp_path / "run", store)
    first = run.save(1000)
    assert store.waiting.wait(30)
    for nimg in (2000, 3000, 4000):
        run.save(nimg)
    assert run.uploads.needed == {first, first.with_name(kimg_name(4000))}
    run.uploads.wait(0.05)
    (*skipped, late) = run.uploads.events()
    assert [(e["event"], e["path"]) for e in skipped] == [("upload_skipped", kimg_name(n)) for n in (2000, 3000)]
    assert (late["event"], late["path"]) == ("upload_failed", first.name)  # waiting has a bound
    store.gate.set()
    run.uploads.wait(30)
    assert run.remote.names() == [kimg_name(1000), kimg_name(4000)]
    assert [e["event"] for e in run.uploads.events()] == ["uploaded", "uploaded"]
    assert run.uploads.needed == set()


def test_a_store_that_is_down_costs_uploads_and_nothing_else(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "store"
    place.write_text("somebody's file")  # the store's directory cannot be made
    run.save(1000)
    while run.uploads.needed:
        time.sleep(0.01)
    (failed,) = run.uploads.events()
    assert (failed["event"], failed["path"]) == ("upload_failed", kimg_name(1000))
    assert "cannot be written" in failed["reason"]
    place.unlink()
    run.uploads.wait(30)  # what failed last gets another chance at the end
    assert [(e["event"], e["path"]) for e in run.uploads.events()] == [("uploaded", kimg_name(1000))]


def test_a_store_that_is_down_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint here the run goes on from it; without one, beginning anew could be wrong."""
    for name, value in {"ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "ACCESS_KEY_ID": "a"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    run = Run(tmp_path / "run", open_store("s3://bucket/run", QUICK))
    local = make_checkpoint(run.path, 1000)
    path, (reason,) = run.uploads.fetch_newer(local, None)
    assert path == local
    assert "in the store were not looked at: s3://bucket/run/run.json: no connection" in reason
    with pytest.raises(CheckpointError, match="nobody can say where the run stands"):
        run.uploads.fetch_newer(None, None)
    run.uploads.wait(30)  # one that failed by now is tried once more
    assert {(e["event"], e["path"]) for e in run.uploads.events()} == {("upload_failed", local.name)}


def test_what_a_run_went_back_from_is_not_resumed_from(tmp_path: Path) -> None:
    store = Gated(tmp_path / "store")
    store.gate.set()
    run = Run(tmp_path / "run", store)
    for nimg in (1000, 2000, 3000):
        run.upload(nimg)
    store.gate.clear()
    store.waiting.clear()
    run.save(4000)
    assert store.waiting.wait(30)
    run.save(5000)
    run.uploads.forget_after(1000)  # while one goes up and another waits
    assert run.uploads.needed == {run.path / "checkpoints" / kimg_name(4000)}
    for path in complete_checkpoints(run.path / "checkpoints")[1:]:
        delete_checkpoint(path)
    # The process ends now; the next one finds newer checkpoints in the store, and must not take them.
    after = Run(tmp_path / "run", open_store(tmp_path / "store"))
    local = run.path / "checkpoints" / kimg_name(1000)
    assert after.uploads.fetch_newer(local, None) == (local, [])
    store.gate.set()
    run.uploads.wait(30)
    assert run.uploads.events() == []  # nobody misses it
    assert kimg_name(4000) not in run.remote.names()
    after.uploads.wait(30)
    after.upload(2000, seed=9)
    assert after.remote.names() == [kimg_name(1000), kimg_name(2000)]
    shutil.rmtree(run.path / "checkpoints")
    fresh = Run(tmp_path / "run", open_store(tmp_path / "store"))
    assert fresh.uploads.fetch_newer(None, None)[0] == local.with_name(kimg_name(2000))
    assert fresh.remote.holds(make_checkpoint(tmp_path / "same", 2000, seed=9))


def test_the_place_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    run.upload(1000)
    other = Run(tmp_path / "other", run.store, identity="two")
    with pytest.raises(RunError, match=r"store/run holds the checkpoints of another run; go on with that one"):
        other.uploads.fetch_newer(None, None)


# Training.


def group_of(
    root: Path, upload: object, iterations: int, expected: int | None = 0, pace: float = 0.0, **policy: Any
) -> None:
    checkpoint = {"upload": str(upload), "keep_last": 2} | policy
    group = start_group(train, 2, root / "log", root, 1, iterations, checkpoint, None, pace)
    assert wait_for_group(group, 90) == [expected] * 2, (root / "log").read_text()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    root = tmp_path_factory.mktemp("quiet")
    group = start_group(train, 2, root / "log", root, 1, 24, {"keep_last": 2})
    assert wait_for_group(group, 60) == [0, 0], (root / "log").read_text()
    return root


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_that_lost_its_machine_goes_on_from_s3_to_the_same_bits(
    s3: S3Server, quiet: Path, tmp_path: Path
) -> None:
    lost, root = tmp_path / "lost", tmp_path / "root"
    lost.mkdir()
    root.mkdir()
    (lost / ".stop").touch()  # preempted at once: the upload is waited for
    group_of(lost, f"{s3.url}/runs", 24, EXIT_STOPPED, upload_grace_s=60)
    assert [e["path"] for e in events(lost, "uploaded")] == [events(lost, "checkpoint")[-1]["path"]]
    (lost / ".stop").unlink()
    store = open_store(f"{s3.url}/runs/tiny")
    torn = make_checkpoint(tmp_path / "torn", 23 * IMAGES)
    for file in torn.iterdir():
        store.put(f"checkpoints/{torn.name}/{file.name}", file)
    (tmp_path / "cut").write_bytes(b"x")
    store.put(f"checkpoints/{torn.name}/shared.safetensors", tmp_path / "cut")
    shutil.rmtree(lost)
    group_of(root, f"{s3.url}/runs", 24)
    (resumed,) = events(root, "resumed")
    (skipped,) = events(root, "checkpoint_skipped")
    assert resumed["nimg"] > 0
    assert f"{torn.name}/shared.safetensors: has 1 bytes" in skipped["reason"]
    assert_same(root, quiet)
    names = [p.name for p in complete_checkpoints(root / "checkpoints")]
    assert RemoteCheckpoints(store).names()[-1] == names[-1] == kimg_name(24 * IMAGES)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_in_the_middle_of_an_upload(quiet: Path, tmp_path: Path) -> None:
    """The half that is there is never picked up, and the run goes on from the one before, wherever it is."""
    store, root = tmp_path / "store", tmp_path / "run"
    root.mkdir()
    remote = RemoteCheckpoints.of_run(str(store), "tiny")
    seen = CONTEXT.Value("q", 0, lock=False)
    policy = {"upload": str(store), "keep_last": 2}
    group = start_group(train, 2, root / "log", root, 1, 24, policy, seen, 0.02, 0.0, 0.1)
    deadline = time.monotonic() + 60
    while True:  # one is complete, and another is on its way
        assert time.monotonic() < deadline, (root / "log").read_text()
        listing = remote.listing()
        half = [name for name, files in listing.items() if MANIFEST not in files]
        if half and len(listing) > len(half):
            break
        time.sleep(0.002)
    for process in group:
        os.kill(process.pid or 0, signal.SIGKILL)
    wait_for_group(group, 60)
    complete = remote.names()
    assert set(half) & (set(remote.listing()) - set(complete)), "the upload ended before the kill"
    shutil.rmtree(root / "checkpoints")
    group_of(root, store, 24)
    assert [r["checkpoint"] for r in events(root, "resumed")] == [complete[-1]]
    assert_same(root, quiet)
    assert remote.names() == [kimg_name(20 * IMAGES), kimg_name(24 * IMAGES)]
    assert list(remote.listing()) == remote.names()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_store_that_is_down_does_not_touch_training(quiet: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("somebody's file")
    group_of(tmp_path, store, 24)
    assert_same(tmp_path, quiet)
    failed = events(tmp_path, "upload_failed")
    assert failed[-1]["path"] == kimg_name(24 * IMAGES)
    assert "cannot be written" in failed[-1]["reason"]
    assert not events(tmp_path, "uploaded")
