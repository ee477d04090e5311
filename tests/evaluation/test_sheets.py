"""Sheets of real systems: what is in which cell, and which systems have which sheet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bessemer.evaluation.sampling import prepare, sampling_mode, to_uint8
from bessemer.evaluation.sheets import class_sheet, interpolation_sheet, sheets_of, truncations_sheet
from bessemer.systems.contract import System
from bessemer.systems.registry import build, get
from bessemer.training.rng import generator


def drawn(name: str, preset: str, **fields: Any) -> System:
    """A system with random weights that differ visibly by class and latent."""
    system = build(name, preset, fields)
    system.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for network in system.networks().values():
            for weights in network.parameters():
                weights.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return system


def cells(sheet: np.ndarray, side: int) -> np.ndarray:
    """[rows, columns, side, side, C]."""
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    return sheet.reshape(rows, side, columns, side, -1).swapaxes(1, 2)


def test_paths_begin_and_end_at_latents_and_stay_on_the_sphere() -> None:
    system = drawn("vae", "tiny8", channels=1)
    sheet = cells(interpolation_sheet(system, [5], seed=3), 8)
    assert sheet.shape == (4, 8, 8, 8, 1)
    draws = generator("cpu", 3, "interpolation")
    a, b = (torch.randn(4, system.config.latent_dim, generator=draws) for _ in range(2))
    middle = (a / a.norm(dim=1, keepdim=True) + b / b.norm(dim=1, keepdim=True)) / 2
    for column, latents in ((0, a), (7, b)):
        with torch.no_grad():
            wanted = to_uint8(system.generate({"latents": latents}, torch.zeros(4, dtype=torch.int64)))
        difference = np.abs(sheet[:, column].astype(int) - wanted.permute(0, 2, 3, 1).numpy())
        assert difference.max() <= 1
    assert middle.norm(dim=1).max() < 1  # where a straight line would have gone
    steps = np.abs(np.diff(sheet.astype(int), axis=1)).mean((0, 2, 3, 4))
    assert (steps > 0).all()


def test_truncation_changes_rows_by_their_latents_alone() -> None:
    system = drawn("biggan", "tiny32", classes=3)
    sheet = truncations_sheet(system, [1, 1, 1], seed=2)
    assert sheet is not None
    assert sheet.note == "Rows: 0.5, 1, none; equal latents."
    rows = cells(sheet.pixels, 32)
    assert rows.shape[:2] == (3, 8)
    assert all(not np.array_equal(rows[0], rows[index]) for index in (1, 2))
    # The last row is what the run draws without truncation.
    prepare(system, [1, 1, 1], seed=2, truncation=None, device="cpu")
    with torch.no_grad(), sampling_mode(system):
        plain = to_uint8(system.sample(torch.arange(8) % 3, generator("cpu", 2, "sheet")))
    assert np.array_equal(rows[2], plain.permute(0, 2, 3, 1).numpy())


def test_rows_that_truncation_leaves_alone_are_left_out() -> None:
    sheet = truncations_sheet(drawn("stylegan2", "tiny32"), [1])
    assert sheet is not None
    assert sheet.note == "Rows: 0.5, none; equal latents."
    assert sheet.pixels.shape == (2 * 32, 8 * 32, 3)
    assert truncations_sheet(drawn("bigan", next(iter(get("bigan").presets))), [1]) is None


@pytest.mark.parametrize(("classes", "rows"), [(3, 3), (40, 32)])
def test_one_latent_in_all_classes(classes: int, rows: int) -> None:
    system = drawn("biggan", "tiny32", classes=classes)
    drawn_classes = class_sheet(system, [1] * classes)
    assert drawn_classes is not None
    sheet = cells(drawn_classes, 32)
    assert sheet.shape[:2] == (rows, 8)
    assert not np.array_equal(sheet[0], sheet[1])


def test_which_systems_have_which_sheets() -> None:
    def names(system: System, classes: int, rows: int) -> list[str]:
        return [one.name for one in sheets_of(system, [1] * classes, rows)]

    many = drawn("biggan", "tiny32", classes=10)
    assert names(many, 10, 4) == ["truncation", "interpolation", "classes"]
    assert names(many, 10, 16) == ["truncation", "interpolation"]  # the grid shows all classes
    assert names(drawn("stylegan2", "tiny32"), 10, 4) == ["truncation", "interpolation"]  # knows no classes
    assert names(drawn("pixelcnnpp", next(iter(get("pixelcnnpp").presets))), 1, 4) == []  # drawn pixel by pixel


def test_large_images_are_made_smaller() -> None:
    system = drawn("vae", "tiny8", resolution=256, hidden=4, channels=1)
    assert interpolation_sheet(system, [1]).shape == (4 * 128, 8 * 128, 1)
