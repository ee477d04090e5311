import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bessemer.data.order import ElasticOrder
from bessemer.data.reading.batches import RawBatch
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.stream import SliceStream
from bessemer.errors import DataError

BATCH, SLICE = 16, 4
LANES = BATCH // SLICE
EPOCH = 60 // LANES * LANES
"""Images per epoch; batches cross its end, since 60 is no multiple of 16."""


def stream(dataset: ShardedDataset, slices: range | list[int] = range(LANES), **options: object) -> SliceStream:
    settings = {"seed": 5, "batch_size": BATCH, "slice_size": SLICE, "mirror": True, "threads": 0, **options}
    return SliceStream(dataset, slices=list(slices), **settings)  # type: ignore[arg-type]


def tensors(some: SliceStream, nimg: int) -> list[torch.Tensor]:
    return [tensor for batch in some.batch(nimg) for tensor in (batch.images, batch.labels)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[list[torch.Tensor]]:
    """The global batches of more than three epochs, read by one worker in one go."""
    with ShardedDataset.open(packed) as dataset:
        one = stream(dataset, cache="none")
        return [tensors(one, step * BATCH) for step in range(13)]


@pytest.fixture
def streams(dataset: ShardedDataset) -> Iterator[list[SliceStream]]:
    opened: list[SliceStream] = []
    yield opened
    for some in opened:
        some.close()


def test_images_are_the_ordered_pixels_mirrored_by_half(
    expected: list[list[torch.Tensor]], dataset: ShardedDataset, truth: tuple[np.ndarray, np.ndarray]
) -> None:
    pixels, labels = truth
    order = ElasticOrder(dataset.shard_counts, 5, LANES)
    flips = 0
    for step, batch in enumerate(expected):
        for lane in range(LANES):
            images, given = batch[2 * lane], batch[2 * lane + 1]
            ids = order.ids(lane, step * SLICE, SLICE)
            assert images.dtype == torch.float32
            assert images.shape == (SLICE, 3, 16, 16)
            assert given.dtype == torch.int64
            assert given.tolist() == labels[ids].tolist()
            for image, number in zip(images, ids, strict=True):
                upright = torch.from_numpy(pixels[number].astype(np.float64)) / 127.5 - 1
                flipped = not torch.allclose(image.double(), upright, atol=1e-6)
                assert torch.allclose(image.double(), upright.flip(-1) if flipped else upright, atol=1e-6)
                flips += flipped
    total = len(expected) * BATCH
    assert abs(flips - total / 2) < 4 * (total / 4) ** 0.5


def test_bytes_become_numbers_on_the_device_that_trains(
    expected: list[list[torch.Tensor]], dataset: ShardedDataset
) -> None:
    for lane, batch in enumerate(stream(dataset).batch(0)):
        assert isinstance(batch, RawBatch)
        assert (batch.raw["images"].dtype, batch.raw["images"].shape) == (torch.uint8, (SLICE, 16, 16, 3))
        moved = batch.to(torch.device("cpu"), torch.channels_last)
        assert moved.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.is_contiguous()
        assert equal([moved.images, moved.labels], expected[0][2 * lane : 2 * lane + 2])
        # What a device of its own computes from the bytes, not from the images that are there already.
        assert torch.equal(batch._numbers("images", torch.device("cpu"), torch.channels_last), expected[0][2 * lane])
        assert batch.to(torch.device("meta")).images.shape == (SLICE, 3, 16, 16)


def test_white_is_one_and_black_is_minus_one(dataset: ShardedDataset) -> None:
    plain = stream(dataset, mirror=False)
    values = torch.cat([batch.images.flatten() for step in range(13) for batch in plain.batch(step * BATCH)])
    assert values.min() == -1.0
    assert values.max() == 1.0
    levels = ((values + 1) * 127.5).round()
    assert torch.equal(levels / 127.5 - 1, values)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("cache", ["none", "decoded", "auto"])
def test_any_number_of_workers_reads_the_same_global_batches(
    world: int, threads: int, cache: str, expected: list[list[torch.Tensor]], packed: Path, streams: list[SliceStream]
) -> None:
    own = LANES // world
    for rank in range(world):
        slices = range(rank * own, (rank + 1) * own)
        streams.append(stream(ShardedDataset.open(packed), slices, threads=threads, cache=cache))
    for step, batch in enumerate(expected):
        together = [tensor for some in streams for tensor in tensors(some, step * BATCH)]
        assert equal(together, batch)


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_a_resume_anywhere_goes_on_as_if_nothing_had_happened(
    threads: int, expected: list[list[torch.Tensor]], packed: Path, streams: list[SliceStream]
) -> None:
    rng = np.random.default_rng(threads)
    for start in rng.integers(0, 12, 6).tolist():
        slices = sorted(rng.permutation(LANES)[: rng.integers(1, LANES + 1)].tolist())
        streams.append(stream(ShardedDataset.open(packed), slices, threads=threads))
        for step in range(start, min(start + 3, 13)):
            wanted = [expected[step][2 * lane + part] for lane in slices for part in (0, 1)]
            assert equal(tensors(streams[-1], step * BATCH), wanted)


def test_requests_in_any_order_give_the_same(
    expected: list[list[torch.Tensor]], dataset: ShardedDataset, streams: list[SliceStream]
) -> None:
    streams.append(stream(dataset, threads=2))
    for step in [3, 3, 4, 3, 12, 0, 1, 0, 2, 11, 10]:
        assert equal(tensors(streams[0], step * BATCH), expected[step])


@pytest.mark.parametrize("threads", [0, 2])
def test_asking_again_costs_nothing(dataset: ShardedDataset, streams: list[SliceStream], threads: int) -> None:
    streams.append(stream(dataset, threads=threads))
    first = streams[0].batch(0)
    second = streams[0].batch(BATCH)
    assert all(a is b for a, b in zip(streams[0].batch(0), first, strict=True))
    assert all(a is b for a, b in zip(streams[0].batch(BATCH), second, strict=True))


def test_memory_stays_bounded(dataset: ShardedDataset, streams: list[SliceStream]) -> None:
    streams.append(stream(dataset, threads=2))
    for step in range(50):
        streams[0].batch(step * BATCH)
    assert len(streams[0]._steps) <= 3


def test_mirror_depends_on_the_seed_and_can_be_off(dataset: ShardedDataset) -> None:
    def flips(seed: int) -> list[bool]:
        mirrored, plain = stream(dataset, seed=seed), stream(dataset, seed=seed, mirror=False)
        return [
            not torch.equal(a, b)
            for step in range(5)
            for one, other in zip(mirrored.batch(step * BATCH), plain.batch(step * BATCH), strict=True)
            for a, b in zip(one.images, other.images, strict=True)
        ]

    assert flips(5) == flips(5)
    assert flips(5) != flips(6)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_a_damaged_sample_stops_the_batch_that_needs_it(
    threads: int, cache: str, packed: Path, tmp_path: Path, streams: list[SliceStream]
) -> None:
    damaged = Path(shutil.copytree(packed, tmp_path / "set"))
    dataset = ShardedDataset.open(damaged)
    order = ElasticOrder(dataset.shard_counts, 5, LANES)
    number = int(order.ids(2, 2 * SLICE, 1)[0])  # slice 2 of the third batch, and of no batch before
    shard = int(np.searchsorted(np.cumsum(dataset.shard_counts), number, side="right"))
    path = damaged / dataset.manifest.shards[shard].name
    data = bytearray(path.read_bytes())
    data[int(dataset._offsets[number, 0]) + 20] ^= 0xFF
    path.write_bytes(data)
    streams.append(stream(dataset, threads=threads, cache=cache))
    streams[0].batch(0)
    streams[0].batch(BATCH)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{path.name}: sample {number:08d} at byte"):
            streams[0].batch(2 * BATCH)


def test_sets_smaller_than_a_batch(packed: Path) -> None:
    with ShardedDataset.open(packed) as dataset:
        large = SliceStream(dataset, seed=0, batch_size=256, slice_size=64, slices=[1], threads=0)
        (batch,) = large.batch(512)
        assert batch.images.shape == (64, 3, 16, 16)
        with pytest.raises(DataError, match=r"60 images .* 128 slices"):
            SliceStream(dataset, seed=0, batch_size=128, slice_size=1, slices=[0])


def test_settings_that_do_not_fit(dataset: ShardedDataset) -> None:
    with pytest.raises(ValueError, match="no multiple"):
        stream(dataset, batch_size=15)
    with pytest.raises(ValueError, match="not all in"):
        stream(dataset, [4])
    with pytest.raises(ValueError, match="auto, none, decoded"):
        stream(dataset, cache="disk")


def test_auto_keeps_small_sets_only(dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream(dataset, cache="auto")._cache is not None
    monkeypatch.setattr("bessemer.data.reading.stream.CACHE_LIMIT", 60 * 3 * 16 * 16)
    assert stream(dataset, cache="auto")._cache is None
    assert stream(dataset, cache="decoded")._cache is not None
