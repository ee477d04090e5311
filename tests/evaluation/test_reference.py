from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from bessemer.evaluation.reference import (
    load_reference,
    reference_hash,
    reference_ids,
    reference_path,
    save_reference,
)


class Extractor:
    name, dimension, weights_sha256, preprocessing = "efflite0", 7, "ab", "224"

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def test_choice_is_fixed_ascending_and_all_where_there_are_fewer() -> None:
    ids = reference_ids(1000, 100)
    assert np.array_equal(ids, reference_ids(1000, 100))
    assert len(np.unique(ids)) == 100
    assert (np.diff(ids) > 0).all()
    assert ids.min() < 100 < 900 < ids.max()  # from the whole set, which is often sorted by class
    assert reference_ids(20, 20).tolist() == reference_ids(20, 500).tolist() == list(range(20))
    assert ids.dtype == np.int64


def test_hash_depends_on_everything_that_the_features_depend_on() -> None:
    keys = {
        reference_hash("d", Extractor(), 10),
        reference_hash("e", Extractor(), 10),
        reference_hash("d", Extractor(), 9),
    }
    for change in ({"weights_sha256": "cd"}, {"preprocessing": "299"}, {"name": "inception"}):
        other = Extractor()
        vars(other).update(change)
        keys.add(reference_hash("d", other, 10))
    assert len(keys) == 6
    assert reference_hash("d", Extractor(), 10) in keys


def test_saved_features_come_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    path = reference_path(tmp_path / "new", Extractor(), "k" * 64)
    save_reference(path, "k" * 64, features)
    found = load_reference(path, "k" * 64, (5, 7))
    assert found is not None
    assert np.array_equal(found, features)
    assert list(path.parent.iterdir()) == [path]


def test_what_does_not_fit_counts_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    assert load_reference(path, "key", (5, 7)) is None
    save_reference(path, "key", np.zeros((5, 7), dtype=np.float32))
    assert load_reference(path, "other", (5, 7)) is None
    assert load_reference(path, "key", (6, 7)) is None
    np.savez(path, key=np.array("key"))
    assert load_reference(path, "key", (5, 7)) is None
    np.savez(path, key=np.array("key"), features=np.array([object()]))
    assert load_reference(path, "key", (1,)) is None


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "text"])
def test_damaged_file_counts_as_missing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "f.npz"
    save_reference(path, "key", np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32))
    data = path.read_bytes()
    middle = len(data) // 2
    damaged = {
        "empty": b"",
        "torn": data[: len(data) * 2 // 3],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "text": b"not an archive",
    }
    path.write_bytes(damaged[damage])
    assert load_reference(path, "key", (50, 7)) is None
