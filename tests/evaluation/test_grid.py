from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bessemer.evaluation.grid import row_labels, sample_grid, save_png, tile


def test_rows_are_classes() -> None:
    assert row_labels(3, 5).tolist() == [0, 1, 2, 0, 1]
    assert row_labels(10, 10).tolist() == list(range(10))
    assert row_labels(0, 2).tolist() == row_labels(1, 2).tolist() == [0, 0]
    many = row_labels(1000, 8)
    assert many.tolist() == sorted(set(many.tolist()))
    assert many.max() < 1000


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_the_same_at_every_time_and_each_row_has_its_class(toy, channels: int) -> None:
    system = toy(channels=channels)
    system.painter.train()
    grid = sample_grid(system, [1, 1, 1], 3, seed=5).picture
    assert grid.shape == (48, 48, channels)
    assert grid.dtype == np.uint8
    assert np.array_equal(grid, sample_grid(system, [1, 1, 1], 3, seed=5).picture)
    assert not np.array_equal(grid, sample_grid(system, [1, 1, 1], 3, seed=6).picture)
    assert system.painter.training
    rows = grid.reshape(3, -1).mean(1)
    assert (np.diff(rows) > 5).all()  # the toy's colours rise with the class
    assert system.painter.norm.running_mean.eq(0).all()


def test_one_class_and_truncation(toy) -> None:
    system = toy()
    own = sample_grid(system, [1, 1, 1], 3, seed=5, label=2).picture
    mixed = sample_grid(system, [1, 1, 1], 3, seed=5).picture
    assert np.array_equal(own[32:], mixed[32:])  # same latents, and row 2 is class 2 in both
    assert not np.array_equal(own[:32], mixed[:32])
    assert sample_grid(system, [1, 1, 1], 3, seed=5, truncation=0.1).picture.std() < mixed.std()


def test_tile_lays_images_out_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 3, 2, 4), dtype=np.uint8) + 1
    grid = tile(images, 2)
    assert grid.shape == (6, 8, 3)
    assert grid[::2, ::4, 0].tolist() == [[1, 2], [3, 4], [5, 0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(tmp_path: Path, channels: int) -> None:
    pixels = (
        torch.randint(0, 256, (6, 9, channels), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint8)
    )
    path = tmp_path / "deep" / "grid.png"
    save_png(path, pixels)
    save_png(path, pixels)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image).reshape(6, 9, channels), pixels)
    assert list(path.parent.iterdir()) == [path]
