"""Packing on Ray gives what packing in one process gives."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.errors import DataError, MachineError
from bessemer.orchestration.packing import ray_runner

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def in_a_process(work: Callable[[Path], None], folder: Path) -> None:
    """A process of its own: Ray keeps the first authentication mode that a process had, and other tests had theirs."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder,))
    process.start()
    process.join(180)
    process.kill()
    assert process.exitcode == 0


def pack_on_ray(folder: Path) -> None:
    source = folder / "images"
    with ray_runner("local", workers=2) as runner:
        pack(source, folder / "ray", shard_bytes=20 << 10, runner=runner)
        (source / "class1" / "bad.png").write_text("x")
        with pytest.raises(DataError, match=r"1 of 41 images cannot be used:\n    class1/bad\.png: not an image"):
            pack(source, folder / "bad", shard_bytes=20 << 10, runner=runner)


def pack_where_nothing_answers(folder: Path) -> None:
    with (
        pytest.raises(MachineError, match=r"--ray 127\.0\.0\.1:9: no Ray cluster answers there"),
        ray_runner("127.0.0.1:9", workers=1),
    ):
        pass


def test_a_local_ray_makes_the_same_bytes_and_tells_the_same_faults(tmp_path: Path) -> None:
    source = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(40):
        path = source / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    manifest = pack(source, tmp_path / "alone", shard_bytes=20 << 10)
    in_a_process(pack_on_ray, tmp_path)
    assert len(manifest.shards) > 3
    for name in manifest.files:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert len(ShardedDataset.open(tmp_path / "ray", verify="sha256")) == 40


def test_an_address_where_nothing_answers(tmp_path: Path) -> None:
    in_a_process(pack_where_nothing_answers, tmp_path)
