"""Writing in the background: what training waits for, what happens when the disk says no."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.training.forked import CONTEXT, start_group, wait_for_group
from tests.training.tiny_work import IMAGES, assert_same, events, train

from bessemer.training.checkpoint_files import complete_checkpoints, kimg_name, verify_checkpoint
from bessemer.training.host_copy import HostCopy
from bessemer.training.saving import reason
from bessemer.training.stopping import EXIT_STOPPED

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    )
)
def test_a_copy_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[object, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("copy") / "file"
    tensors = {f"t{i}": (torch.randn(shape) * 3).to(dtype) for i, (dtype, shape) in enumerate(kinds)}  # type: ignore[arg-type]
    copy = HostCopy()
    for chosen in ({"before": torch.ones(7)}, tensors):
        copy.choose(chosen)
        copy.copy()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()  # training goes on
    entry = copy.write(path)
    assert entry["bytes"] == path.stat().st_size
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_copy_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    copy = HostCopy()
    copy.choose({"a": torch.ones(3)})
    copy.copy()
    with pytest.raises(FileNotFoundError) as caught:
        copy.write(tmp_path / "missing" / "rank-00000.safetensors")
    assert reason(caught.value) == f"{tmp_path}/missing/rank-00000.safetensors: No such file or directory"


def train_with_slow_copies(*args: Any) -> int:
    """Many iterations fit into the time that a copy takes; without waiting for it they would end up in the file."""
    copy = HostCopy.copy

    def slowly(self: HostCopy) -> None:
        time.sleep(0.2)
        copy(self)

    HostCopy.copy = slowly  # type: ignore[method-assign]  # in a process of its own
    return train(*args)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_background_and_foreground_write_the_same_bytes(tmp_path: Path) -> None:
    manifests = []
    for background, work in ((True, train), (True, train_with_slow_copies), (False, train)):
        root = tmp_path / f"{background} {work.__name__}"
        root.mkdir()
        group = start_group(work, 2, root / "log", root, 1, 8, {"background": background})
        assert wait_for_group(group, 60) == [0, 0], (root / "log").read_text()
        saved = complete_checkpoints(root / "checkpoints")
        assert [p.name for p in saved] == [kimg_name(4 * IMAGES), kimg_name(8 * IMAGES)]
        manifests.append([json.loads((p / "manifest.json").read_text()) for p in saved])
        assert [r["path"] for r in events(root, "checkpoint")] == [p.name for p in saved]
        assert not list((root / "checkpoints").glob(".*"))
    assert manifests[0] == manifests[1] == manifests[2]
    for root in ("True train", "True train_with_slow_copies"):
        assert_same(tmp_path / root, tmp_path / "False train")


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(tmp_path: Path, background: bool) -> None:
    """Worker 1 cannot write more than a few bytes while the second of four checkpoints is due."""
    seen = CONTEXT.Value("q", 0, lock=False)
    policy = {"background": background, "keep_last": 100}
    group = start_group(train, 2, tmp_path / "log", tmp_path, 1, 16, policy, seen, 0.05)

    def wait(iterations: int) -> None:
        deadline = time.monotonic() + 60
        while seen.value < iterations * IMAGES:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wait(6)
    resource.prlimit(group[1].pid or 0, resource.RLIMIT_FSIZE, (1000, hard))
    wait(10)
    resource.prlimit(group[1].pid or 0, resource.RLIMIT_FSIZE, (hard, hard))
    assert wait_for_group(group, 60) == [0, 0], (tmp_path / "log").read_text()
    saved = complete_checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in saved] == [kimg_name(n * IMAGES) for n in (4, 12, 16)]
    for path in saved:
        verify_checkpoint(path)
    (failed,) = events(tmp_path, "checkpoint_failed")
    assert failed["path"] == kimg_name(8 * IMAGES)
    assert "rank-00001.safetensors: File too large" in failed["reason"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_checkpoint_that_cannot_take_its_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / kimg_name(4 * IMAGES)).write_text("somebody's file")
    group = start_group(train, 2, tmp_path / "log", tmp_path, 0, 8, {})
    assert wait_for_group(group, 60) == [0, 0], (tmp_path / "log").read_text()
    (failed,) = events(tmp_path, "checkpoint_failed")
    assert kimg_name(4 * IMAGES) in failed["reason"]
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints")] == [kimg_name(8 * IMAGES)]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_newest_whole_checkpoint_survives_a_damaged_one_ahead_of_it(tmp_path: Path) -> None:
    """With `keep_last` 1, counting the damaged one would leave nothing to resume from."""

    def run(expected: int, **policy: object) -> list[str]:
        group = start_group(train, 1, tmp_path / "log", tmp_path, 0, 8, policy)
        assert wait_for_group(group, 60) == [expected], (tmp_path / "log").read_text()
        return [p.name for p in complete_checkpoints(tmp_path / "checkpoints")]

    straight, bent = kimg_name(4 * IMAGES), kimg_name(8 * IMAGES)
    assert run(0, keep_last=2) == [straight, bent]
    final = (tmp_path / "final.safetensors").read_bytes()
    file = tmp_path / "checkpoints" / bent / "shared.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # its length is right: only its bytes tell
    file.write_bytes(data)
    (tmp_path / ".stop").touch()
    assert run(EXIT_STOPPED, keep_last=1) == [kimg_name(5 * IMAGES), bent]
    assert "shared.safetensors: sha256 differs" in events(tmp_path, "checkpoint_skipped")[0]["reason"]
    (tmp_path / ".stop").unlink()
    assert run(0, keep_last=1) == [bent]
    verify_checkpoint(tmp_path / "checkpoints" / bent)
    assert (tmp_path / "final.safetensors").read_bytes() == final
