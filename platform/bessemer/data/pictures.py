"""Pictures of samples of any kind, for people to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pictures"]

Pixels = NDArray[np.uint8]

_FRAMES = 8
"""Most frames of a clip that are shown."""
_WAVE = (64, 256)
"""Height and width of the picture of a piece of sound."""


def pictures(fields: Mapping[str, NDArray[Any]]) -> Pixels:
    """One picture per sample: pairs side by side, frames of clips in a row, sound as its waveform, bits as pixels.

    Args:
        fields: as :meth:`bessemer.data.reading.dataset.ShardedDataset.read_fields` gives them.

    Returns:
        [N, C, H, W].
    """
    drawn = [_DRAW[name](values) for name, values in fields.items()]
    if len({picture.shape[1] for picture in drawn}) > 1:  # grey beside colour
        drawn = [np.repeat(picture, 3 // picture.shape[1], axis=1) for picture in drawn]
    return np.concatenate(drawn, axis=3)


def _clips(values: Pixels) -> Pixels:
    frames = values.shape[1]
    shown = values if frames <= _FRAMES else values[:, np.arange(_FRAMES) * frames // _FRAMES]
    n, t, channels, height, width = shown.shape
    return shown.transpose(0, 2, 3, 1, 4).reshape(n, channels, height, t * width)


def _audio(values: NDArray[np.int16]) -> Pixels:
    """Black from the least to the greatest sample in each column, on white."""
    height, width = _WAVE
    picture = np.full((len(values), 1, height, width), 255, dtype=np.uint8)
    bounds = np.linspace(0, values.shape[1], width + 1).astype(int)
    rows = np.arange(height)[None, :]
    for column in range(width):
        part = values[:, bounds[column] : max(bounds[column + 1], bounds[column] + 1)].astype(np.int64)
        # Loud and positive is at the top.
        top = (32767 - part.max(axis=1)) * height >> 16
        bottom = (32767 - part.min(axis=1)) * height >> 16
        picture[:, 0, :, column][(rows >= top[:, None]) & (rows <= bottom[:, None])] = 0
    return picture


def _bits(values: Pixels) -> Pixels:
    """White where a bit is set: a square where their number has a root, else one row."""
    edge = math.isqrt(values.shape[1])
    shape = (edge, edge) if edge * edge == values.shape[1] else (1, values.shape[1])
    return (values * np.uint8(255)).reshape(len(values), 1, *shape)


_DRAW: dict[str, Any] = {
    **dict.fromkeys(("images", "targets", "others"), lambda values: values),
    "clips": _clips,
    "audio": _audio,
    "bits": _bits,
}
