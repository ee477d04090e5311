"""Packers that are killed, interrupted or run into each other: the next one goes on, and nothing is half there."""

import errno
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.packing.folders import files_of, identity

from bessemer.data.manifest import Manifest
from bessemer.data.packing import pack as packing
from bessemer.data.packing.pack import pack
from bessemer.errors import DataError

Draw = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def test_what_a_killed_packer_of_something_else_left_is_not_taken(source: Path, tmp_path: Path) -> None:
    left = tmp_path / ".set.partial"
    left.mkdir()
    (left / "shard-000000.tar").write_bytes(b"x")
    other = tmp_path / ".other.partial"
    other.mkdir()
    pack(source, tmp_path / "set")
    assert not left.exists()
    assert other.exists()
    assert sorted(files_of(tmp_path / "set")) == ["index.npy", "manifest.json", "shard-000000.tar"]


def test_a_data_set_that_was_moved_away_when_its_packer_was_killed_comes_back(source: Path, tmp_path: Path) -> None:
    manifest = pack(source, tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / ".set.replaced-01234567")
    (source / "class0" / "bad.jpg").write_text("x")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        pack(source, tmp_path / "set", overwrite=True)
    assert Manifest.load(tmp_path / "set") == manifest


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_interrupted_while_it_publishes_it_makes_no_shard_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Notes are removed one by one, an index before its shard's note or after; the plan is the last."""
    aside, removed, unlink = tmp_path / ".set.partial", [], Path.unlink

    def notes() -> list[Path]:
        return [path for path in aside.glob("shard-*") if path.suffix != ".tar"]

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if (aside / "manifest.json").exists():
            if len(removed) >= share * (len(removed) + len(notes())):
                raise KeyboardInterrupt
            removed.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "set", shard_bytes=2000)
    assert bool(notes()) == (share < 1)
    before = {path.name: identity(path) for path in aside.glob("shard-*.tar")}
    assert len(before) > 2
    manifest = pack(source, tmp_path / "set", shard_bytes=2000)
    assert {path.name: identity(path) for path in (tmp_path / "set").glob("shard-*.tar")} == before
    assert manifest == pack(source, tmp_path / "plain", shard_bytes=2000)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "plain")


PACK = """
import sys
from pathlib import Path
from bessemer.data.packing.pack import pack
if __name__ == "__main__":
    pack(sys.argv[1], Path(sys.argv[2]), shard_bytes=int(sys.argv[3]), workers=int(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, draw: Draw, encode: Encode) -> Path:
    """A compressed archive of 3000 images."""
    archive = tmp_path_factory.mktemp("many") / "images.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for number in range(3000):
            data = encode(draw(number), "JPEG")
            info = tarfile.TarInfo(f"{number % 5}/{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive


def packer(source: Path, destination: Path, workers: int = 1) -> list[str | Path]:
    """A command that packs into shards of about 250 samples."""
    return [sys.executable, "-c", PACK, source, destination, str(600 << 10), str(workers)]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_the_destination_is_absent_or_whole(many: Path, tmp_path: Path) -> None:
    destination, aside = tmp_path / "set", tmp_path / ".set.partial"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "platform")}
    shards = len(pack(many, tmp_path / "plain", shard_bytes=600 << 10).shards)
    taken_up = attempt = 0
    while attempt < 12:
        attempt += 1
        # What was done before this attempt: inode and time would change if it were done again.
        done = {path.with_suffix("").name: identity(path.with_suffix(".tar")) for path in aside.glob("shard-*.json")}
        taken_up += 0 < len(done) < shards
        process = subprocess.Popen(packer(many, destination, workers=1 + attempt % 2), env=environment)
        while process.poll() is None and len(list(aside.glob("shard-*.json"))) <= len(done):
            time.sleep(0.002)
        if attempt < 12:
            time.sleep(random.Random(attempt).uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        process.wait()
        folder = destination if destination.exists() else aside
        assert {name: identity(folder / f"{name}.tar") for name in done} == done
        if destination.exists():
            break
    assert taken_up
    if not destination.exists():
        subprocess.run(packer(many, destination, workers=2), env=environment, check=True)
    assert files_of(destination) == files_of(tmp_path / "plain")
    assert not list(tmp_path.glob(".set.*"))


@pytest.mark.multiprocess
def test_the_number_of_workers_changes_no_byte(many: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    for workers in (1, 3):
        pack(
            many,
            tmp_path / str(workers),
            shard_bytes=1 << 20,
            workers=workers,
            progress=lambda done, total: calls.append((done, total)),
        )
        assert calls[-1] == (3000, 3000)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")
    assert len(list((tmp_path / "3").glob("*.tar"))) > 3


def test_shards_of_another_source_or_rule_are_made_again(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shard_bytes": 40 << 10, "threads": 1}

    def interrupted(**more: Any) -> None:
        with monkeypatch.context() as patch:
            made = iter(range(2))
            real = packing.pack_shard
            patch.setattr(packing, "pack_shard", lambda *a: (next(made, None) is None and stop()) or real(*a))
            with pytest.raises(KeyboardInterrupt):
                pack(tree, tmp_path / "set", **{**options, **more})

    def stop() -> None:
        raise KeyboardInterrupt

    aside = tmp_path / ".set.partial"
    interrupted(size=8)
    small = {path.name: identity(path) for path in aside.glob("*.tar")}
    assert len(small) == 2
    # Shards of another filter have the same counts: only the plan tells them apart.
    interrupted(size=8, resize="box")
    assert not {identity(path) for path in aside.glob("*.tar")} & set(small.values())
    interrupted()
    done = {path.name: identity(path) for path in aside.glob("*.tar")}
    assert len(done) == 2
    # A damaged one is made again, a sound one is not.
    (aside / "shard-000000.tar").write_bytes((aside / "shard-000000.tar").read_bytes()[:-1] + b"x")
    pack(tree, tmp_path / "set", **options)
    assert files_of(tmp_path / "set") == files_of(packed)
    assert identity(tmp_path / "set" / "shard-000001.tar") == done["shard-000001.tar"]


def test_two_packers_of_one_destination_do_not_meet(source: Path, tmp_path: Path) -> None:
    def again(done: int, total: int | None) -> None:
        if total is not None:
            with pytest.raises(DataError, match="is being packed by another process"):
                pack(source, tmp_path / "set")

    pack(source, tmp_path / "set", progress=again)
    assert Manifest.load(tmp_path / "set").samples == 8


def test_a_full_disk_keeps_what_is_done(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_synced", full)
        with pytest.raises(DataError, match="No space left on device; free some space and give the same command again"):
            pack(source, tmp_path / "set")
    made = identity(tmp_path / ".set.partial" / "shard-000000.tar")
    pack(source, tmp_path / "set")
    assert identity(tmp_path / "set" / "shard-000000.tar") == made
