import shutil
from pathlib import Path

import numpy as np
import pytest

from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.quarantine import Quarantine
from bessemer.data.reading.stream import SliceStream
from bessemer.errors import DataError

Truth = tuple[np.ndarray, np.ndarray]
BAD = [3, 17, 18, 40]


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """A copy of the set in which the samples `BAD` are damaged."""
    copy = Path(shutil.copytree(packed, tmp_path / "set"))
    for number in BAD:
        damage(copy, number)
    return copy


def damage(directory: Path, number: int) -> None:
    with ShardedDataset.open(directory) as dataset:
        shard = int(dataset.shards_of(np.array([number]))[0])
        path = directory / dataset.manifest.shards[shard].name
        at = int(dataset._offsets[number, 0]) + int(dataset._lengths[number, 0]) // 2
    data = bytearray(path.read_bytes())
    data[at : at + 8] = bytes(byte ^ 0xFF for byte in data[at : at + 8])
    path.write_bytes(data)


def test_a_bad_sample_is_replaced_by_a_sound_one_of_its_class(damaged: Path, truth: Truth) -> None:
    pixels, labels = truth
    quarantine = Quarantine(10)
    with ShardedDataset.open(damaged, quarantine=quarantine) as dataset:
        images = dataset.read(np.arange(60))
        sound = np.setdiff1d(np.arange(60), BAD)
        assert np.array_equal(images[sound], pixels[sound])
        assert np.array_equal(dataset.labels, labels)
        for number in BAD:
            (same,) = np.flatnonzero((pixels == images[number]).all((1, 2, 3)))
            assert same not in BAD
            assert labels[same] == labels[number]
        assert len(quarantine) == len(BAD)
        found = quarantine.take_new()
        assert sorted(sample.number for sample in found) == BAD
        assert all(sample.shard.startswith("shard-") and "crc32" in sample.reason for sample in found)
        assert [sample.offset for sample in found] == [int(dataset._offsets[sample.number, 0]) for sample in found]
        dataset.read(np.arange(60))
        assert quarantine.take_new() == []  # each is reported once


def test_the_substitute_depends_on_nothing_but_the_damage(damaged: Path) -> None:
    with ShardedDataset.open(damaged, quarantine=Quarantine(10)) as dataset:
        expected = dataset.read(np.arange(60))
    rng = np.random.default_rng(0)
    for _ in range(5):
        with ShardedDataset.open(damaged, quarantine=Quarantine(10)) as dataset:
            order = rng.permutation(np.concatenate([np.arange(60), BAD, BAD]))  # some twice in one request
            for part in np.array_split(order, rng.integers(1, 9)):
                assert np.array_equal(dataset.read(part), expected[part])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_batches_are_the_same_for_any_number_of_workers(world: int, cache: str, damaged: Path) -> None:
    def batches(slices: list[int], threads: int) -> list[np.ndarray]:
        with ShardedDataset.open(damaged, quarantine=Quarantine(10)) as dataset:
            stream = SliceStream(
                dataset, seed=1, batch_size=16, slice_size=4, slices=slices, threads=threads, cache=cache
            )
            found = [np.concatenate([batch.images.numpy() for batch in stream.batch(16 * step)]) for step in range(8)]
            stream.close()
            return found

    expected = batches([0, 1, 2, 3], 0)
    own = 4 // world
    parts = [batches(list(range(rank * own, (rank + 1) * own)), threads=2) for rank in range(world)]
    for step, whole in enumerate(expected):
        assert np.array_equal(np.concatenate([part[step] for part in parts]), whole)


def test_there_is_a_bound(damaged: Path) -> None:
    with (
        ShardedDataset.open(damaged, quarantine=Quarantine(3)) as dataset,
        pytest.raises(DataError, match=r"shard-\d{6}\.tar: sample \d{8} at byte \d+ .*data\.max_bad_samples: 3"),
    ):
        dataset.read(np.arange(60))


def test_a_class_with_nothing_left_stops_the_run(packed: Path, truth: Truth, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "set"))
    for number in np.flatnonzero(truth[1] == 1).tolist():
        damage(copy, number)
    with (
        ShardedDataset.open(copy, quarantine=Quarantine(60)) as dataset,
        pytest.raises(DataError, match="none of its class could replace it"),
    ):
        dataset.read(np.flatnonzero(truth[1] == 1))


def test_without_it_the_first_bad_sample_stops_and_the_message_says_how_to_go_on(damaged: Path) -> None:
    with (
        ShardedDataset.open(damaged) as dataset,
        pytest.raises(DataError, match=r"sample 00000003 at byte \d+ .*copy the shard .*on_bad_sample: quarantine"),
    ):
        dataset.read(np.array([3]))
