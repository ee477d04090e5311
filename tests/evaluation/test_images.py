from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bessemer.data.packing.pack import pack
from bessemer.errors import DataError
from bessemer.evaluation.images import open_images, read_in_groups


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_gives_its_pixels_labels_and_classes(tmp_path: Path) -> None:
    colours = [noise(8, 8, 3, seed=i) for i in range(4)]
    for i, pixels in enumerate(colours):
        save(tmp_path / ("cat" if i < 3 else "dog") / f"{i}.png", pixels)
    with open_images(tmp_path) as images:
        assert len(images) == 4
        assert (images.manifest.classes, images.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 1])
        np.testing.assert_array_equal(
            images.read(np.array([3, 0])), np.stack([colours[3], colours[0]]).transpose(0, 3, 1, 2)
        )


def test_images_of_any_size_and_mode_come_in_groups(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(8, 8, 3))
    save(tmp_path / "b.png", noise(6, 9, 3))
    save(tmp_path / "c.png", noise(8, 8))
    save(tmp_path / "d.png", noise(8, 8, 3, seed=1), "P")
    clear = noise(8, 8, 4)
    clear[..., 3] = 0
    save(tmp_path / "e.png", clear)
    with open_images(tmp_path) as images:
        found = read_in_groups(images, np.array([0, 1, 2, 3, 4]))
        shapes = {tuple(pixels.shape): positions.tolist() for positions, pixels in found}
        assert shapes == {(3, 3, 8, 8): [0, 3, 4], (1, 3, 6, 9): [1], (1, 1, 8, 8): [2]}
        assert (images.read(np.array([4])) == 255).all()  # transparent over white
        with pytest.raises(DataError, match=r"differ in size \(\[3, 8, 8\], \[3, 6, 9\]\)"):
            images.read(np.array([0, 1]))


def test_the_hash_is_that_of_names_and_contents(tmp_path: Path) -> None:
    def hash_of(folder: Path) -> str:
        with open_images(folder) as images:
            return images.manifest.hash

    for name in ("one", "two", "renamed", "changed"):
        save(tmp_path / name / ("x.png" if name == "renamed" else "a.png"), noise(4, 4, seed=name == "changed"))
    assert hash_of(tmp_path / "one") == hash_of(tmp_path / "two")
    assert len({hash_of(tmp_path / name) for name in ("one", "renamed", "changed")}) == 3


def test_a_packed_data_set_is_opened_as_one(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "images" / "a" / f"{i}.png", noise(8, 8, 3, seed=i))
    manifest = pack(tmp_path / "images", tmp_path / "packed")
    with open_images(tmp_path / "packed") as images, open_images(tmp_path / "images") as files:
        assert images.manifest.hash == manifest.hash
        packed, loose = ({image.tobytes() for image in side.read(np.arange(3))} for side in (images, files))
        assert packed == loose
        assert len(packed) == 3


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(8, 8, 3))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    with open_images(tmp_path) as images, pytest.raises(DataError, match=r"b\.png cannot be read"):
        images.read(np.array([1]))
    with pytest.raises(DataError, match="does not exist"), open_images(tmp_path / "nowhere"):
        pass
