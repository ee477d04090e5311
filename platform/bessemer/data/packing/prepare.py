"""From the file a person has to the bytes a shard stores: checks, centre-crop, resize, colour mode."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bessemer.data.fields import Kind
from bessemer.data.reading.decode import decode, decode_into, is_jpeg, read_header

__all__ = ["MODES", "Mode", "Prepared", "Resize", "Rules", "prepare"]

Resize = Literal["none", "lanczos", "box", "bicubic"]
Mode = Literal["RGB", "L"]

MODES = ("RGB", "L")
"""Colour modes that are stored: three channels, or one."""
_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
_STORED = {"JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True)
class Rules:
    """How images are made equal."""

    size: int | None
    """Edge length in pixels; None takes images as they are."""
    resize: Resize
    """Filter that brings the centre-cropped square to `size`; `none` cuts `size` pixels out of the centre."""
    mode: Mode | None
    """Colour mode; None takes images as they are."""
    kind: Kind = "images"
    """What a sample is."""
    count: int | None = None
    """Frames of a clip, samples of a piece of sound, or bits of a vector."""
    rate: int | None = None
    """Samples of sound per second."""


@dataclass(frozen=True)
class Prepared:
    """A file as it is stored, and what it was like."""

    data: bytes
    ending: str
    width: int
    height: int
    mode: str
    """Colour mode; empty for what is no picture."""
    passed_through: bool
    """Stored byte for byte as it came."""


def prepare(data: bytes | NDArray[np.uint8], rules: Rules) -> Prepared:
    """Check an image by decoding it whole, and fit it to the rules.

    Args:
        data: an image file, or pixels [H, W, C] of 1 (grey), 3 (RGB) or 4 (RGBA) channels.
        rules: how images are made equal.

    Images that fit already are passed through byte for byte (JPEG and PNG); others become PNG, so that nothing is
    lost to a second compression.

    Raises:
        ValueError: the image is damaged or cannot be fitted; the message says why.
    """
    if not isinstance(data, bytes):
        return _prepare_pixels(data, rules)
    header = read_header(data)
    if header.mode.startswith(("I", "F")):
        raise ValueError(f"{header.mode} pixels of more than 8 bits cannot be stored: convert it to 8 bits first")
    mode = rules.mode or header.mode
    width, height = (header.width, header.height) if rules.size is None else (rules.size, rules.size)
    fits = (header.width, header.height, header.mode) == (width, height, mode)
    if mode in MODES and fits and header.format in _STORED and header.orientation == 1:
        if is_jpeg(data):
            decode_into(data, np.empty((height, width, 3 if mode == "RGB" else 1), dtype=np.uint8))
        else:
            decode(data, header)
        return Prepared(data, _STORED[header.format], width, height, mode, passed_through=True)
    return _prepared(decode(data, header), rules)


def _prepare_pixels(pixels: NDArray[np.uint8], rules: Rules) -> Prepared:
    return _prepared(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), rules)


def _prepared(image: Image.Image, rules: Rules) -> Prepared:
    image = _fit(_convert(image, rules.mode), rules)
    file = io.BytesIO()
    if image.mode in MODES:  # else the caller refuses the mode, and wants to know of all of them first
        image.save(file, "PNG")
    return Prepared(file.getvalue(), "png", image.width, image.height, image.mode, passed_through=False)


def _convert(image: Image.Image, mode: Mode | None) -> Image.Image:
    if mode is None or image.mode == mode:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _fit(image: Image.Image, rules: Rules) -> Image.Image:
    size = rules.size
    if size is None or image.size == (size, size):
        return image
    edge = min(image.size) if rules.resize != "none" else size
    if min(image.size) < edge:
        raise ValueError(f"{image.width}x{image.height} is smaller than {size}x{size}; resize none cannot enlarge")
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    image = image.crop((left, top, left + edge, top + edge))
    return image if rules.resize == "none" else image.resize((size, size), _FILTERS[rules.resize])
