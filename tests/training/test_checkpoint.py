"""Checkpoints restore exactly, and damaged ones are passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bessemer.errors import CheckpointError
from bessemer.spec.job import CheckpointSpec
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.checkpoint_files import kimg_name, verify_checkpoint
from bessemer.training.distributed import Workers


def merged(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weights of rank 0 and, by parameter, optimizer state of all ranks in one piece."""
    whole: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for rank, state in enumerate(states):
        for key, value in state.items():
            if ".exp_avg" in key:
                name, start = key.rsplit(".", 1)
                pieces.setdefault(name, []).append((int(start), value))
            elif rank == 0:
                whole[key] = value
    return whole | {k: torch.cat([v for _, v in sorted(p, key=lambda x: x[0])]) for k, p in pieces.items()}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "workers"), [(0, 2), (1, 2), (2, 1)])
def test_resume_is_bit_equal(launch: object, tmp_path: Path, stage: int, workers: int) -> None:
    straight = merged(launch(workers, stage, 10))  # type: ignore[operator]
    run = tmp_path / "run"
    launch(workers, stage, 6, "--run", run)  # type: ignore[operator]
    shutil.rmtree(run / "checkpoints" / kimg_name(192))  # the one at its end: go back to iteration 4
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [kimg_name(128)]
    resumed = merged(launch(workers, stage, 10, "--run", run))  # type: ignore[operator]
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped(launch: object, tmp_path: Path) -> None:
    straight = merged(launch(1, 0, 10))  # type: ignore[operator]
    run = tmp_path / "run"
    launch(1, 0, 8, "--run", run)  # type: ignore[operator]
    newest = run / "checkpoints" / kimg_name(256)
    file = newest / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000.*sha256"):
        verify_checkpoint(newest)
    resumed = merged(launch(1, 0, 10, "--run", run))  # type: ignore[operator]
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


ALONE = Workers(rank=0, size=1, device=torch.device("cpu"))


def make_checkpoint(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    manifest = {"format": 1, "nimg": 1, "files": {"a": {"bytes": 3, "sha256": digest}}}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "a").unlink(), "is missing"),
        (lambda p: (p / "a").write_bytes(b"abcd"), "4 bytes, the manifest says 3"),
        (lambda p: (p / "a").write_bytes(b"abd"), "sha256"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"format": 9, "files": {}}'), "format 9"),
    ],
)
def test_verify_names_the_damage(tmp_path: Path, damage: object, message: str) -> None:
    good, bad = tmp_path / "kimg-000000.001", tmp_path / "kimg-000000.002"
    make_checkpoint(good)
    make_checkpoint(bad)
    verify_checkpoint(good)
    damage(bad)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(bad)
    found, skipped = CheckpointStore(tmp_path, CheckpointSpec(), ALONE).find()
    assert found == good
    assert message in skipped[0]


def test_unfinished_checkpoints_are_not_seen(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".kimg-000000.005.deadbeef")
    (tmp_path / "kimg-000000.006").mkdir()
    assert CheckpointStore(tmp_path, CheckpointSpec(), ALONE).complete() == []
    assert CheckpointStore(tmp_path, CheckpointSpec(), ALONE).find() == (None, [])


def test_another_run_is_refused(tmp_path: Path) -> None:
    mine = Identity("biggan", {"resolution": 32}, 0, 64, 32, "hash")
    mine.check({**vars(mine)}, tmp_path)
    for field, other in (("seed", 1), ("batch_size", 128), ("system", "nvae"), ("data_hash", "x")):
        with pytest.raises(CheckpointError, match=field):
            mine.check({**vars(mine), field: other}, tmp_path)
