"""Sheets of samples: the same latents at every point of a run, so that sheets over time show learning alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.data.fields import wave_file
from bessemer.data.pictures import pictures
from bessemer.evaluation.images import RealImages
from bessemer.evaluation.inputs import Inputs
from bessemer.evaluation.sampling import prepare, sampling_mode, to_stored, to_uint8
from bessemer.files import write_atomically
from bessemer.systems.contract import System
from bessemer.systems.translating import TranslationSystem
from bessemer.training.rng import generator

__all__ = [
    "Sheet",
    "columns_of",
    "device_of",
    "draw_truncated",
    "row_labels",
    "sample_grid",
    "save_png",
    "tile",
    "translation_sheet",
    "truncation_sheet",
]


def row_labels(classes: int, rows: int) -> NDArray[np.int64]:
    """Class of each row of a grid: all classes in turn, or an even choice where there are more classes than rows."""
    row = np.arange(rows, dtype=np.int64)
    return row % max(classes, 1) if classes <= rows else row * classes // rows


@dataclass(frozen=True)
class Sheet:
    """Samples in rows: a picture of them all, and for clips and sound also what plays."""

    fields: Mapping[str, NDArray[Any]]
    """Name -> [N, ...] as a data set stores it; the parts of a sample are shown side by side."""
    columns: int
    """Samples in a row."""
    rate: int | None = None
    """Samples of sound per second."""

    @property
    def picture(self) -> NDArray[np.uint8]:
        """[H, W, C] pixels. The frames of a clip stand in a row, sound is drawn as waveform and spectrogram."""
        return tile(pictures(self.fields), self.columns)

    def save(self, path: Path) -> list[Path]:
        """Write the picture as a PNG, and beside it clips as an animated GIF, or sound as a WAV file.

        Returns:
            What was written, the picture first.
        """
        save_png(path, self.picture)
        written = [path]
        if "clips" in self.fields:
            written.append(path.with_suffix(".gif"))
            _save_gif(written[-1], self.fields["clips"])
        if "audio" in self.fields:
            assert self.rate is not None
            written.append(path.with_suffix(".wav"))
            pause = np.zeros((len(self.fields["audio"]), self.rate // 4), dtype=np.int16)
            one_by_one = np.concatenate([self.fields["audio"], pause], axis=1).reshape(-1)
            data = wave_file(one_by_one, self.rate)
            write_atomically(written[-1], lambda f: f.write(data))
        return written


def columns_of(shapes: Mapping[str, Sequence[int]], rows: int) -> int:
    """Samples in a row of a sheet of so many rows, so that it is about as wide as high; at least one.

    Args:
        shapes: field -> shape of one sample.
        rows: of the sheet.
    """
    blank = {name: np.zeros((1, *shape), np.int16 if name == "audio" else np.uint8) for name, shape in shapes.items()}
    *_, height, width = pictures(blank).shape
    return max(1, rows * int(height) * len(shapes) // int(width))


def sample_grid(
    system: System,
    class_counts: Sequence[int],
    rows: int,
    seed: int = 0,
    truncation: float | None = None,
    *,
    label: int | None = None,
    renew: bool = True,
) -> Sheet:
    """Draw rows of samples, one class per row: as many in each as there are rows, or fewer where they are wide.

    Args:
        system: with the weights to sample, on any device; the mode of its modules is restored.
        class_counts: training images of each class.
        rows: of the grid.
        seed: seed of the latents; each row has its own, whatever the number of rows.
        truncation: truncation of the latents; ``None`` for none.
        label: the one class to draw, instead of all.
        renew: renew standing statistics first; not needed right after an evaluation with the same truncation.
    """
    device = device_of(system)
    if renew:
        prepare(system, class_counts, seed=seed, truncation=truncation, device=device)
    classes = row_labels(len(class_counts), rows) if label is None else np.full(rows, label)
    columns, drawn = columns_of({system.sample_field: system.sample_shape}, rows), []
    with torch.no_grad(), sampling_mode(system):
        for row, own in enumerate(classes):
            labels = torch.full((columns,), int(own), dtype=torch.int64, device=device)
            drawn.append(system.sample(labels, generator(device, seed, "grid", row), truncation))
    return _sheet(system, torch.cat(drawn), columns)


def truncation_sheet(
    system: System,
    class_counts: Sequence[int],
    columns: int,
    truncations: Sequence[float],
    seed: int = 0,
    *,
    label: int | None = None,
) -> Sheet:
    """The same latents at several truncations, one row for each: what truncation gives and takes.

    Args:
        system: with the weights to sample, on any device; the mode of its modules is restored.
        class_counts: training images of each class.
        columns: latents; their classes take turns.
        truncations: from the top downwards; standing statistics are renewed for each.
        seed: seed of the latents.
        label: the one class to draw, instead of all.
    """
    own = row_labels(len(class_counts), columns) if label is None else np.full(columns, label)
    return _sheet(system, torch.cat(draw_truncated(system, class_counts, own, truncations, seed)), columns)


def draw_truncated(
    system: System,
    class_counts: Sequence[int],
    labels: NDArray[np.int64],
    truncations: Sequence[float | None],
    seed: int,
) -> list[Tensor]:
    """The same latents at each of several truncations, ``None`` for none: samples [N, ...] of `labels` for each.

    Standing statistics are renewed for each, and stay as the last one asks for.
    """
    device, drawn = device_of(system), []
    for truncation in truncations:
        prepare(system, class_counts, seed=seed, truncation=truncation, device=device)
        with torch.no_grad(), sampling_mode(system):
            own = torch.from_numpy(labels).to(device)
            drawn.append(system.sample(own, generator(device, seed, "sheet"), truncation))
    return drawn


def device_of(system: System) -> torch.device:
    """Where the networks are that samples come from."""
    return next(system.networks()[system.sampled_networks[0]].parameters()).device


def _sheet(system: System, samples: Tensor, columns: int) -> Sheet:
    stored = to_stored(system.sample_field, samples).cpu().numpy()
    return Sheet({system.sample_field: stored}, columns, getattr(system.config, "rate", None))


def translation_sheet(system: TranslationSystem, images: RealImages, columns: int, seed: int = 0) -> Sheet:
    """Inputs above what they are translated to: the views of a system, line by line, in as many bands as fit a square.

    Args:
        system: with the weights to sample, on any device; the mode of its modules is restored.
        images: data set or images that the inputs are a fixed choice of.
        columns: inputs side by side, and lines at most; there is at least one band.
        seed: of what the translation draws.
    """
    device = device_of(system)
    inputs, bands, lines = Inputs(system, images, columns * columns), list[Tensor](), 0
    with torch.no_grad(), sampling_mode(system):
        for start in range(0, len(inputs), columns):
            views = system.views(inputs.batch(slice(start, start + columns), device), generator(device, seed, "sheet"))
            lines += len(views)
            if bands and lines > columns:
                break
            for view in views.values():
                band = torch.full((columns, *view.shape[1:]), -1.0, device=device)  # black where inputs are too few
                band[: len(view)] = view
                bands.append(band)
    channels = max(band.shape[1] for band in bands)
    shown = torch.cat([band.expand(-1, channels, -1, -1) for band in bands])  # grey stands as colour beside others
    return Sheet({"images": to_uint8(shown).cpu().numpy()}, columns)


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


def _save_gif(path: Path, clips: NDArray[np.uint8], per_second: int = 10) -> None:
    """Write clips [N, T, C, H, W] side by side in a square, over and over."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(clips)))
    moments = [tile(clips[:, t], columns) for t in range(clips.shape[1])]
    first, *others = (Image.fromarray(m[:, :, 0] if m.shape[2] == 1 else m) for m in moments)
    duration = 1000 // per_second
    write_atomically(
        path,
        lambda f: first.save(f, format="GIF", save_all=True, append_images=others, duration=duration, loop=0),
    )
