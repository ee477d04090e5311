import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.order import ElasticOrder, permutation, random_words
from bessemer.errors import DataError

orders = st.builds(
    lambda counts, seed, lanes, window, whole: ElasticOrder(
        counts, seed, min(lanes, sum(counts)), window, whole=1 << 17 if whole else 0
    ),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**63 - 1),
    lanes=st.integers(1, 8),
    window=st.integers(1, 16),
    whole=st.booleans(),
)


def epoch_ids(order: ElasticOrder, epoch: int) -> np.ndarray:
    start = epoch * order.lane_length
    return np.concatenate([order.ids(lane, start, order.lane_length) for lane in range(order.lanes)])


@given(orders, st.integers(0, 1000))
def test_an_epoch_holds_each_image_at_most_once(order: ElasticOrder, epoch: int) -> None:
    ids = epoch_ids(order, epoch)
    assert ids.dtype == np.int64
    assert len(ids) == order.samples - order.samples % order.lanes
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < order.samples


@given(orders, st.integers(0, 500), st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_a_request_is_the_same_in_one_piece_or_many(order: ElasticOrder, start: int, pieces: list[int]) -> None:
    lane = order.lanes - 1
    whole = order.ids(lane, start, sum(pieces))  # crosses the ends of epochs: lanes are short
    fresh = ElasticOrder(order._counts, order.seed, order.lanes, order.window, whole=1 << 17 if order._is_whole else 0)
    parts = []
    for piece in pieces:
        parts.append(fresh.ids(lane, start, piece))
        start += piece
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("whole", [0, 1 << 17])
def test_epochs_differ_and_what_is_left_out_rotates(whole: int) -> None:
    order = ElasticOrder([10, 7, 6], 3, lanes=4, window=4, whole=whole)  # 23 images: 3 are left out
    left_out = [frozenset(range(23)) - set(epoch_ids(order, epoch).tolist()) for epoch in range(60)]
    assert all(len(some) == 3 for some in left_out)
    assert frozenset.union(*left_out) == frozenset(range(23))
    assert not np.array_equal(epoch_ids(order, 0), epoch_ids(order, 1))


def test_seeds_and_lanes_give_other_orders() -> None:
    first, other = ElasticOrder([100], 0, 2), ElasticOrder([100], 1, 2)
    assert not np.array_equal(first.ids(0, 0, 50), other.ids(0, 0, 50))
    assert not np.array_equal(first.ids(0, 0, 50), first.ids(1, 0, 50))


def test_large_sets_are_complete_and_read_few_shards_at_a_time() -> None:
    order = ElasticOrder([997] * 1200, 7, lanes=64)
    ids = epoch_ids(order, 5)
    assert len(np.unique(ids)) == len(ids) == 1_196_400 - 1_196_400 % 64
    assert not np.array_equal(ids, np.sort(ids))
    for lane in (0, 63):
        window = order.ids(lane, 5 * order.lane_length + 4096, 4096)
        assert len(np.unique(window // 997)) <= 4096 // 997 + 2


def test_more_lanes_than_images_names_the_numbers() -> None:
    with pytest.raises(DataError, match=r"3 images .* 4 slices"):
        ElasticOrder([1, 2], 0, lanes=4)
    assert ElasticOrder([1, 2], 0, lanes=3).ids(1, 0, 10).shape == (10,)


def test_outside_requests_are_refused() -> None:
    order = ElasticOrder([8], 0, lanes=2)
    assert order.ids(0, 3, 0).shape == (0,)
    for lane, start, count in ((2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(ValueError, match="lane"):
            order.ids(lane, start, count)


def test_random_words_depend_on_every_part_of_the_purpose() -> None:
    purposes: list[tuple[int | str, ...]] = [("a", 1), ("a1",), ("a", "1"), ("a", 1, 0), (1, "a"), ()]
    words = {random_words(1, seed, *purpose).item() for seed in (0, 1, 2**63 - 1) for purpose in purposes}
    assert len(words) == 3 * len(purposes)
    assert np.array_equal(random_words(5, 1, "x"), random_words(9, 1, "x")[:5])


def test_the_order_is_the_same_for_ever() -> None:
    """A run resumed with another NumPy, Python or processor must go on in its order."""
    assert permutation(8, 0, "pack").tolist() == [5, 0, 7, 3, 6, 4, 2, 1]
    assert ElasticOrder([30, 30], 1, 2).ids(1, 100, 6).tolist() == [18, 11, 7, 35, 6, 25]
    assert ElasticOrder([30, 30], 1, 2, 8, whole=0).ids(1, 100, 6).tolist() == [34, 35, 32, 33, 38, 36]


@given(st.integers(0, 200), st.integers(0, 2**63 - 1))
def test_permutation_holds_each_number_once(count: int, seed: int) -> None:
    assert sorted(permutation(count, seed, "x").tolist()) == list(range(count))
