"""The global batches are a function of the job alone: any number of workers and threads, any resume, across epochs."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bessemer.data.index import INDEX_DTYPE
from bessemer.data.order import ElasticOrder
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.stream import SliceStream

BATCH, SLICE, LANES, STEPS = 32, 4, 8, 12
"""60 images: an epoch ends within every second batch, seven of them in twelve steps."""


def read(path: Path, slices: list[int], steps: list[int], threads: int, kept: str = "none") -> list[list[np.ndarray]]:
    """For each step, images and labels of each slice."""
    with ShardedDataset.open(path) as dataset:
        stream = SliceStream(
            dataset,
            seed=9,
            batch_size=BATCH,
            slice_size=SLICE,
            slices=slices,
            mirror=True,
            threads=threads,
            cache=kept,
        )
        try:
            return [
                [array for one in stream.batch(step * BATCH) for array in (one.images.numpy(), one.labels.numpy())]
                for step in steps
            ]
        finally:
            stream.close()


@cache
def whole(path: Path) -> list[list[np.ndarray]]:
    return read(path, list(range(LANES)), list(range(STEPS)), 0)


def same(found: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> bool:
    pairs = zip((a for row in found for a in row), (b for row in expected for b in row), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("threads", [0, 1, 2, 3, 4])
def test_worlds_and_threads(world: int, threads: int, packed: Path) -> None:
    for rank in range(world):
        slices = list(range(rank, LANES, world))  # as the trainer deals them out
        expected = [[row[2 * lane + part] for lane in slices for part in (0, 1)] for row in whole(packed)]
        assert same(read(packed, slices, list(range(STEPS)), threads), expected)


@given(
    moves=st.lists(
        st.tuples(st.integers(0, STEPS - 1), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    ),
    kept=st.sampled_from(["none", "decoded"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resumes_anywhere_with_other_workers(moves: list[tuple[int, int, int, int]], kept: str, packed: Path) -> None:
    for start, length, world, threads in moves:
        steps = list(range(start, min(start + length, STEPS)))
        for rank in range(world):
            slices = list(range(rank, LANES, world))
            expected = [[whole(packed)[t][2 * lane + part] for lane in slices for part in (0, 1)] for t in steps]
            assert same(read(packed, slices, steps, threads, kept), expected)


def test_a_large_index_keeps_twenty_bytes_per_sample(packed: Path) -> None:
    """1.2 million samples are 24 MB for each worker: 192 MB on a node of eight."""
    assert INDEX_DTYPE.itemsize == 20
    with ShardedDataset.open(packed) as dataset:
        held = {name: a for name, a in vars(dataset).items() if isinstance(a, np.ndarray) and len(a) == len(dataset)}
        assert sorted(held) == ["_crc32", "_labels", "_lengths", "_offsets"]
        owners = {id(a.base) for a in held.values()}
        assert len(owners) == 1  # columns of one buffer
        assert all(a.strides[0] == 20 for a in held.values())


def test_the_order_of_a_large_set_keeps_no_list_of_it() -> None:
    order = ElasticOrder([1000] * 1200, 0, lanes=64)
    for lane in range(64):
        order.ids(lane, 3_000_000, 4096)
    windows = order._window.cache_info().maxsize
    assert windows is not None
    assert windows * order.window * 8 < 10e6
    assert order._sequence.cache_info().currsize * len(order._counts) * 16 < 1e6
    assert order._epoch.cache_info().currsize == 0
