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
"""Height and width of the waveform of a piece of sound, and of the spectrogram below it."""
_WINDOW = 256
"""Samples of which a column of the spectrogram is made."""
_DECIBELS = 80.0
"""From white, the loudest, to black."""


def pictures(fields: Mapping[str, NDArray[Any]]) -> Pixels:
    """One picture per sample: pairs side by side, frames of clips in a row, sound as waveform and spectrogram, bits.

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
    return np.concatenate([_waveform(values), _spectrogram(values)], axis=2)


def _spectrogram(values: NDArray[np.int16]) -> Pixels:
    """How loud each frequency is, from 0 at the bottom to half the rate at the top, as time goes by."""
    height, width = _WAVE
    padded = np.pad(values.astype(np.float32) / 32768, ((0, 0), (0, max(0, _WINDOW - values.shape[1]))))
    starts = np.linspace(0, padded.shape[1] - _WINDOW, width).astype(int)
    parts = np.stack([padded[:, start : start + _WINDOW] for start in starts], axis=1) * np.hanning(_WINDOW)
    bins = np.abs(np.fft.rfft(parts, axis=2))[:, :, 1:]
    power = np.square(bins).reshape(*bins.shape[:2], height, -1).mean(axis=3)
    decibels = 10 * np.log10(power + 1e-10)
    level = 1 + (decibels - 10 * np.log10((_WINDOW / 4) ** 2)) / _DECIBELS  # 1: a sine of full loudness
    picture: Pixels = (255 * np.clip(level, 0, 1)).astype(np.uint8).transpose(0, 2, 1)[:, None, ::-1]
    return picture


def _waveform(values: NDArray[np.int16]) -> Pixels:
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
