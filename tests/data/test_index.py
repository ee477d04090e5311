import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.index import INDEX_DTYPE, Index, index_bytes, parse_index
from bessemer.errors import DataError

SHARDS, SAMPLES, COUNTS = [8192, 4096], [3, 2], [2, 3]


def index() -> Index:
    rows = [(512, 100, 0, 1), (2048, 700, 1, 2), (4096, 4096, 1, 3), (512, 1, 0, 4), (1024, 3072, 1, 5)]
    return np.array(rows, dtype=INDEX_DTYPE)


def parse(data: bytes) -> Index:
    return parse_index(data, "set/index.npy", shard_bytes=SHARDS, shard_samples=SAMPLES, class_counts=COUNTS)


def test_round_trip() -> None:
    assert np.array_equal(parse(index_bytes(index()))[:, 0], index())


@pytest.mark.parametrize("samples", [1, 9, 10, 12345])
def test_numpy_reads_the_file_without_pickle(samples: int) -> None:
    records = np.zeros(samples, dtype=INDEX_DTYPE)
    records["offset"] = np.arange(samples)
    read = np.load(io.BytesIO(index_bytes(records)), allow_pickle=False)
    assert read.dtype == INDEX_DTYPE
    assert np.array_equal(read, records)


@pytest.mark.parametrize(
    ("row", "field", "value", "message"),
    [
        (1, "offset", 2049, r"sample 1 lies at byte 2049 .* multiple of 512"),
        (0, "offset", 0, "sample 0 lies at byte 0"),
        (3, "offset", -512, "sample 3 lies at byte -512"),
        (4, "offset", 2**62, "sample 4 lies at byte"),
        (2, "length", 4097, r"\(\+4097\) of a shard of 8192 bytes"),
        (4, "length", 2**32 - 1, "sample 4"),
        (3, "label", 2, "sample 3 has label 2 of 2 classes"),
        (3, "label", 1, r"class counts are \[1, 4\], the manifest says \[2, 3\]"),
    ],
)
def test_faults_name_the_record(row: int, field: str, value: int, message: str) -> None:
    damaged = index()
    damaged[field][row] = value
    with pytest.raises(DataError, match=message) as error:
        parse(index_bytes(damaged))
    assert "set/index.npy" in str(error.value)
    assert "pack the data set anew" in str(error.value)


def test_samples_of_several_files() -> None:
    """Five samples of two files each."""
    records = np.stack([index(), index()], axis=1)
    records["offset"][:, 1] += 512
    records["length"] = 1
    shape = {"shard_bytes": SHARDS, "shard_samples": SAMPLES, "class_counts": COUNTS, "members": 2}
    data = index_bytes(records)
    assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), records)
    assert np.array_equal(parse_index(data, "index.npy", **shape), records)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="5 samples need"):
        parse(data)
    for field, value, message in (("offset", 1 << 20, "sample 3 lies at"), ("label", 1, "files of sample 3 have diff")):
        damaged = records.copy()
        damaged[field][3, 1] = value
        with pytest.raises(DataError, match=message):
            parse_index(index_bytes(damaged), "index.npy", **shape)  # type: ignore[arg-type]


def test_wrong_size_and_wrong_header() -> None:
    good = index_bytes(index())
    with pytest.raises(DataError, match="5 samples need"):
        parse(good[:-1])
    with pytest.raises(DataError, match="header differs"):
        parse(b"x" + good[1:])


@given(st.binary(max_size=400))
def test_no_bytes_are_an_index(data: bytes) -> None:
    with pytest.raises(DataError):
        parse(data)


@given(st.lists(st.tuples(st.integers(0, len(index_bytes(index())) - 1), st.integers(0, 255)), max_size=8))
def test_any_change_is_a_data_error_or_a_sound_index(changes: list[tuple[int, int]]) -> None:
    data = bytearray(index_bytes(index()))
    for place, value in changes:
        data[place] = value
    try:
        read = parse(bytes(data))[:, 0]
    except DataError:
        return
    ends = np.repeat(SHARDS, SAMPLES)
    assert (read["offset"] >= 512).all()
    assert (read["offset"] + read["length"] <= ends).all()
    assert np.bincount(read["label"], minlength=2).tolist() == COUNTS
