"""Sources of video: folders of frames, animated files, and arrays, which :mod:`bessemer.data.sources.arrays` reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError

from bessemer.data.sources.archives import Files
from bessemer.data.sources.pairs import Parts
from bessemer.data.sources.pieces import open_file
from bessemer.errors import DataError

__all__ = ["ANIMATED", "are_animated", "clip_frames", "count_frames", "frames_in_folders"]

ANIMATED = frozenset({".gif", ".webp", ".apng"})
"""Endings of files that hold a clip each."""

_DAMAGED = (OSError, ValueError, EOFError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)


def frames_in_folders(
    name: str, images: Iterable[PurePosixPath]
) -> tuple[Parts, dict[PurePosixPath, list[PurePosixPath]]]:
    """Clips of which each is a folder of frames, in the order of the numbers in their names.

    Returns:
        The first frame of each clip with the parts of the clip's name, and all frames of it.

    Raises:
        DataError: a frame lies in no folder.
    """
    clips: dict[PurePosixPath, list[PurePosixPath]] = {}
    for path in images:
        if len(path.parts) < 2:
            raise DataError(
                f"{name}: {path} lies in no folder; each clip is a folder of frames, such as clip7/0001.jpg"
            )
        clips.setdefault(path.parent, []).append(path)
    for frames in clips.values():
        frames.sort(key=_natural)
    return {frames[0]: folder.parts for folder, frames in clips.items()}, {one[0]: one for one in clips.values()}


def _natural(path: PurePosixPath) -> tuple[tuple[int, str], ...]:
    """``9.jpg`` before ``10.jpg``."""
    words = re.split(r"(\d+)", path.name)
    return tuple((int(word), word) if word.isdigit() else (-1, word) for word in words)


def are_animated(files: Files, paths: Sequence[PurePosixPath]) -> bool:
    """Whether each file is a clip, judged by the endings and by the first of them: WebP may be frames too."""
    try:
        return all(path.suffix.lower() in ANIMATED for path in paths) and count_frames(files, paths[0]) > 1
    except ValueError:
        return True  # a damaged clip, which is named when all are counted


def count_frames(files: Files, path: PurePosixPath) -> int:
    """Frames of an animated file.

    Raises:
        ValueError: it is damaged.
    """
    with open_file(files, path) as file:
        try:
            with Image.open(file) as image:
                return int(getattr(image, "n_frames", 1))
        except _DAMAGED as error:
            raise ValueError(str(error) or type(error).__name__) from None


def clip_frames(files: Files, path: PurePosixPath, first: int, count: int) -> list[NDArray[np.uint8]]:
    """Frames ``first .. first + count`` of an animated file or an array, each [H, W, C].

    Raises:
        ValueError: it is damaged, or ends before.
    """
    if path.suffix.lower() not in ANIMATED:
        content = files.read(path)
        assert not isinstance(content, bytes)
        return list(content[first : first + count])
    found = []
    with open_file(files, path) as file:
        try:
            with Image.open(file) as image:
                for number, frame in enumerate(ImageSequence.Iterator(image)):
                    if first <= number < first + count:
                        mode = "L" if frame.mode == "L" else "RGBA" if "transparency" in frame.info else "RGB"
                        pixels = np.asarray(frame.convert(mode))
                        found.append(pixels[..., None] if pixels.ndim == 2 else pixels)
        except _DAMAGED as error:
            raise ValueError(str(error) or type(error).__name__) from None
    if len(found) != count:
        raise ValueError(f"it ends after {first + len(found)} frames")
    return found
