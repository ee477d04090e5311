"""Grids of samples: the same latents at every point of a run, so that grids over time show learning alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.evaluation.sampling import prepare, sampling_mode, to_uint8
from bessemer.files import write_atomically
from bessemer.systems.contract import System
from bessemer.training.rng import generator

__all__ = ["row_labels", "sample_grid", "save_png", "tile", "truncation_sheet"]


def row_labels(classes: int, rows: int) -> NDArray[np.int64]:
    """Class of each row of a grid: all classes in turn, or an even choice where there are more classes than rows."""
    row = np.arange(rows, dtype=np.int64)
    return row % max(classes, 1) if classes <= rows else row * classes // rows


def sample_grid(
    system: System,
    class_counts: Sequence[int],
    rows: int,
    seed: int = 0,
    truncation: float | None = None,
    *,
    label: int | None = None,
    renew: bool = True,
) -> NDArray[np.uint8]:
    """Draw `rows` x `rows` samples, one class per row.

    Args:
        system: with the weights to sample, on any device; the mode of its modules is restored.
        class_counts: training images of each class.
        rows: rows and columns.
        seed: seed of the latents; each row has its own, whatever the number of rows.
        truncation: truncation of the latents; ``None`` for none.
        label: the one class to draw, instead of all.
        renew: renew standing statistics first; not needed right after an evaluation with the same truncation.

    Returns:
        [rows * H, rows * W, C] pixels.
    """
    device = next(system.networks()[system.sampled_networks[0]].parameters()).device
    if renew:
        prepare(system, class_counts, seed=seed, truncation=truncation, device=device)
    classes = row_labels(len(class_counts), rows) if label is None else np.full(rows, label)
    drawn = []
    with torch.no_grad(), sampling_mode(system):
        for row, own in enumerate(classes):
            labels = torch.full((rows,), int(own), dtype=torch.int64, device=device)
            drawn.append(to_uint8(system.sample(labels, generator(device, seed, "grid", row), truncation)))
    return tile(torch.cat(drawn).cpu().numpy(), rows)


def truncation_sheet(
    system: System,
    class_counts: Sequence[int],
    columns: int,
    truncations: Sequence[float],
    seed: int = 0,
    *,
    label: int | None = None,
) -> NDArray[np.uint8]:
    """The same latents at several truncations, one row for each: what truncation gives and takes.

    Args:
        system: with the weights to sample, on any device; the mode of its modules is restored.
        class_counts: training images of each class.
        columns: latents; their classes take turns.
        truncations: from the top downwards; standing statistics are renewed for each.
        seed: seed of the latents.
        label: the one class to draw, instead of all.

    Returns:
        [rows * H, columns * W, C] pixels.
    """
    device = next(system.networks()[system.sampled_networks[0]].parameters()).device
    own = row_labels(len(class_counts), columns) if label is None else np.full(columns, label)
    labels, drawn = torch.from_numpy(own).to(device), []
    for truncation in truncations:
        prepare(system, class_counts, seed=seed, truncation=truncation, device=device)
        with torch.no_grad(), sampling_mode(system):
            drawn.append(to_uint8(system.sample(labels, generator(device, seed, "sheet"), truncation)))
    return tile(torch.cat(drawn).cpu().numpy(), columns)


def tile(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay [N, C, H, W] images out in rows of `columns`: [rows * H, columns * W, C], the last row filled with black."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, channels, height, width), dtype=np.uint8)
    cells[:count] = images
    grid = cells.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(grid.reshape(rows * height, columns * width, channels))


def save_png(path: Path, array: NDArray[np.uint8]) -> None:
    """Write [H, W, 1 or 3] pixels as a PNG, whole or not at all; makes the directory."""
    from PIL import Image

    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: image.save(f, format="PNG"))
