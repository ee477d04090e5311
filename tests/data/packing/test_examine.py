from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bessemer.data.packing.examine import Examination, examine, sample_images
from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset


def examined(pixels: np.ndarray, tmp_path: Path, labels: object = None, **options: object) -> Examination:
    arrays = {"images": pixels} if labels is None else {"images": pixels, "labels": np.asarray(labels)}
    np.savez(tmp_path / "set.npz", **arrays)
    pack(tmp_path / "set.npz", tmp_path / "set", shard_bytes=64 << 10, overwrite=True)
    return examine(tmp_path / "set", **options)  # type: ignore[arg-type]


def random(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def has(found: Examination, words: str) -> bool:
    return any(words in warning for warning in found.warnings)


def test_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    images = (random(1200, 8, 8, 3) * [0.1, 0.5, 1]).astype(np.uint8)
    calls: list[tuple[int, int | None]] = []
    found = examined(images, tmp_path, np.arange(1200) % 10, progress=lambda done, total: calls.append((done, total)))
    pixels = images.reshape(-1, 3) / 255
    assert found.fields[0].mean == pytest.approx(pixels.mean(axis=0), abs=1e-12)
    assert found.fields[0].std == pytest.approx(pixels.std(axis=0), abs=1e-12)
    assert found.classes == {str(label): 120 for label in range(10)}
    assert (found.examined, found.samples, found.fields[0].grey, found.fields[0].flat) == (1200, 1200, 0, 0)
    assert found.duplicates == []
    assert found.warnings == []
    assert found.shards > 1
    assert calls[-1] == (1200, 1200)


def test_a_part_of_the_images_is_spread_over_all(tmp_path: Path) -> None:
    images = np.repeat(np.arange(1200, dtype=np.uint16) // 6, 64).astype(np.uint8).reshape(1200, 8, 8)
    found = examined(images, tmp_path, images=300)
    assert found.examined == 300
    assert found.fields[0].mean[0] == pytest.approx(images.mean() / 255, abs=0.03)


def test_duplicates_are_found_over_all_shards_and_near_ones_are_not(tmp_path: Path) -> None:
    images = random(300, 8, 8)
    images[[7, 250]] = images[40]
    images[100] = images[200]
    images[101] = images[201]
    images[101, 0, 0] ^= 1
    found = examined(images, tmp_path, images=10)
    assert sorted(map(len, found.duplicates)) == [2, 3]
    assert found.superfluous == 3
    stored = sample_ids(tmp_path / "set")
    assert {frozenset(stored[one] for one in group) for group in found.duplicates} == {
        frozenset([images[40].tobytes()]),
        frozenset([images[100].tobytes()]),
    }


def sample_ids(path: Path) -> list[bytes]:
    with ShardedDataset.open(path) as dataset:
        return [image.tobytes() for image in dataset.read(np.arange(len(dataset)))]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (random(20, 8, 8), None), "there is one class"),
        (lambda: (random(20, 8, 8), None), "there are 20 images: below 1000"),
        (lambda: (random(60, 8, 8), [0] * 58 + [1] * 2), "58 images of '0', 2 of '1'"),
        (lambda: (random(60, 8, 8), [0] * 58 + [1] * 2), "1 of 2 classes have fewer than 50 images"),
        (
            lambda: (np.repeat(random(20, 8, 8, 1), 3, axis=3), None),
            "all images examined are grey but stored in colour",
        ),
        (
            lambda: (np.concatenate([random(19, 8, 8), np.full((1, 8, 8), 7, np.uint8)]), None),
            "1 of 20 images examined",
        ),
        (lambda: (np.repeat(random(5, 8, 8), 2, axis=0), None), "5 images are exact copies of others"),
        (lambda: (random(20, 8, 8) // 100, None), "next to no contrast"),
        (
            lambda: (random(20, 28, 28), None),
            "28 pixels are no power of two, as most systems need; pack with --size 16 or 32",
        ),
    ],
)
def test_warnings(make: Callable[[], tuple[np.ndarray, object]], words: str, tmp_path: Path) -> None:
    images, labels = make()
    assert has(examined(images, tmp_path, labels), words)
    good = examined(random(1000, 8, 8, 3), tmp_path, np.arange(1000) % 2)
    assert not has(good, words)


def test_a_picture_has_a_row_for_each_class(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2] * 4)
    images = np.full((12, 8, 8), 0, np.uint8) + labels[:, None, None].astype(np.uint8)
    examined(images, tmp_path, labels)
    rows = sample_images(tmp_path / "set", 4, 5).reshape(4, 5, -1)
    assert [set(row.ravel().tolist()) for row in rows] == [{0}, {1}, {2}, {0}]
    assert [set(row.ravel().tolist()) for row in sample_images(tmp_path / "set", 2, 3).reshape(2, -1)] == [{0}, {1}]
