import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bessemer.data.packing.pack import pack
from bessemer.data.reading import shard_files as module
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.errors import DataError

Truth = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the data set that may be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "set"))


def test_pixels_and_labels_equal_an_independent_reading(dataset: ShardedDataset, truth: Truth) -> None:
    pixels, labels = truth
    assert len(dataset) == 60
    assert np.array_equal(dataset.read(np.arange(60)), pixels)
    assert dataset.labels.dtype == np.int64
    assert np.array_equal(dataset.labels, labels)
    ids = np.array([59, 0, 7, 7, 30])
    images = dataset.read(ids)
    assert images.flags.c_contiguous
    assert np.array_equal(images, pixels[ids])
    assert dataset.read(np.empty(0, dtype=np.int64)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("verify", ["sizes", "sha256"])
def test_a_whole_set_opens(packed: Path, verify: str) -> None:
    with ShardedDataset.open(str(packed), verify=verify) as dataset:  # type: ignore[arg-type]
        assert dataset.manifest.facts == {"resolution": 16, "channels": 3, "classes": 3}
        assert dataset.shape == (3, 16, 16)


def test_grey_images(write_tree: Callable[..., Path], tmp_path: Path) -> None:
    pack(write_tree(tmp_path / "source", 2, 2), tmp_path / "set", mode="L")
    with ShardedDataset.open(tmp_path / "set") as dataset:
        assert dataset.read(np.arange(4)).shape == (4, 1, 16, 16)


def test_ids_out_of_range(dataset: ShardedDataset) -> None:
    for wrong in (-1, 60):
        with pytest.raises(IndexError, match="60 samples"):
            dataset.read(np.array([0, wrong]))


def test_threads_share_few_open_files(packed: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPEN_SHARDS", 1)
    with ShardedDataset.open(packed) as dataset, ThreadPoolExecutor(8) as pool:
        rng = np.random.default_rng(0)
        requests = [rng.integers(0, 60, 16) for _ in range(200)]
        for ids, images in zip(requests, pool.map(dataset.read, requests), strict=True):
            assert np.array_equal(images, truth[0][ids])
        assert len(dataset.shards._open) <= 1


def test_reading_goes_on_after_close(dataset: ShardedDataset, truth: Truth) -> None:
    dataset.read(np.arange(60))
    dataset.close()
    assert not dataset.shards._open
    assert np.array_equal(dataset.read(np.arange(3)), truth[0][:3])


def test_missing_shards_are_named(copy: Path) -> None:
    (copy / "shard-000000.tar").unlink()
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"2 of \d shards are missing: shard-000000\.tar, shard-000002\.tar; .*pack"):
        ShardedDataset.open(copy)


def test_a_shard_of_another_size_is_named(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.truncate(size - 512)
    with pytest.raises(DataError, match=rf"shard-000001\.tar has {size - 512} bytes instead of {size}"):
        ShardedDataset.open(copy)


def test_a_changed_shard_fails_sha256(copy: Path) -> None:
    flip(copy / "shard-000001.tar", 100)  # in a header, which reading by the index never looks at
    assert ShardedDataset.open(copy).read(np.arange(60)).shape == (60, 3, 16, 16)
    with pytest.raises(DataError, match=r"shard-000001\.tar has other content \(sha256 differs\)"):
        ShardedDataset.open(copy, verify="sha256")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("place", [3, 100, 136, 140, 148, -1])
def test_a_damaged_index_is_refused(copy: Path, place: int) -> None:
    flip(copy / "index.npy", place)
    with pytest.raises(DataError, match=r"index\.npy: .*pack the data set anew"):
        ShardedDataset.open(copy)


def test_a_missing_or_cut_index_is_refused(copy: Path) -> None:
    data = (copy / "index.npy").read_bytes()
    (copy / "index.npy").write_bytes(data[:-20])
    with pytest.raises(DataError, match="60 samples need"):
        ShardedDataset.open(copy)
    (copy / "index.npy").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        ShardedDataset.open(copy)


def test_a_changed_sample_is_named_with_shard_key_and_offset(copy: Path) -> None:
    dataset = ShardedDataset.open(copy)
    first, second = dataset.shard_counts[:2]
    number = first + second - 1
    offset = int(dataset._offsets[number, 0])
    flip(copy / "shard-000001.tar", offset + int(dataset._lengths[number, 0]) - 1)
    fresh = ShardedDataset.open(copy)
    others = np.delete(np.arange(60), number)
    assert fresh.read(others).shape == (59, 3, 16, 16)
    with pytest.raises(
        DataError, match=rf"shard-000001\.tar: sample {number:08d} at byte {offset} is damaged: .*crc32"
    ):
        fresh.read(np.arange(60))


def test_a_shard_that_shrinks_or_vanishes_while_open(copy: Path) -> None:
    dataset = ShardedDataset.open(copy)
    with (copy / "shard-000000.tar").open("ab") as file:
        file.truncate(600)
    with pytest.raises(DataError, match=r"shard-000000\.tar: sample 00000000 at byte 512 is damaged: the shard ends"):
        dataset.read(np.array([0]))
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar cannot be opened: No such file"):
        dataset.read(np.array([dataset.shard_counts[0]]))


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bessemer data pack SOURCE"):
        ShardedDataset.open(tmp_path / "nowhere")
