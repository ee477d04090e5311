"""Sources of sound: WAV files of whole numbers, one channel. A recording is cut into pieces of equal length."""

from __future__ import annotations

import wave
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.data.sources.archives import Files
from bessemer.data.sources.pieces import open_file

__all__ = ["SOUND", "Recording", "describe_recording", "sound_piece"]

SOUND = frozenset({".wav", ".wave"})
"""Endings of the files that are taken for sound."""

_FIX = "convert it: ffmpeg -i FILE -ac 1 -c:a pcm_s16le OUT.wav"


class Recording(NamedTuple):
    """What the header of a WAV file says."""

    rate: int
    """Samples per second."""
    samples: int


def describe_recording(files: Files, path: PurePosixPath) -> Recording:
    """The rate and the length of a recording.

    Raises:
        ValueError: it is damaged, or not of one channel of whole numbers.
    """
    with open_file(files, path) as file, _open(file) as reader:
        if reader.getnchannels() != 1:
            raise ValueError(f"it has {reader.getnchannels()} channels; sound has one: {_FIX}")
        return Recording(reader.getframerate(), reader.getnframes())


def sound_piece(files: Files, path: PurePosixPath, first: int, count: int) -> NDArray[np.int16]:
    """Samples ``first .. first + count`` of a recording, the upper 16 bits of each.

    Raises:
        ValueError: it is damaged, or ends before.
    """
    with open_file(files, path) as file, _open(file) as reader:
        width = reader.getsampwidth()
        try:
            reader.setpos(first)
            data = reader.readframes(count)
        except (wave.Error, EOFError, OSError) as error:
            raise ValueError(str(error) or "it is cut off") from None
    if len(data) != count * width:
        raise ValueError(f"it is cut off: sample {first + len(data) // width} of {first + count} is missing")
    if width == 1:  # the only width without a sign
        return (np.frombuffer(data, dtype=np.uint8).astype(np.int16) - 128) << 8
    upper = np.frombuffer(data, dtype=np.uint8).reshape(count, width)[:, -2:]
    return np.ascontiguousarray(upper).view("<i2")[:, 0].astype(np.int16)


def _open(file: object) -> wave.Wave_read:
    try:
        return wave.open(file, "rb")  # type: ignore[call-overload, no-any-return]
    except (wave.Error, EOFError) as error:
        raise ValueError(f"no WAV file of whole numbers ({error or 'cut off'}): {_FIX}") from None
