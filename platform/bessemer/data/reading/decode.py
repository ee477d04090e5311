"""From the bytes of an image to pixels: simplejpeg (strict, frees the GIL) for JPEG, PIL for the rest.

Faults are `ValueError`; callers know the file or sample and turn them into `DataError`.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

__all__ = ["ImageHeader", "decode", "decode_into", "is_jpeg", "read_header"]

_JPEG_MODES = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}
_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself."""

    format: str
    """`JPEG`, `PNG`, `WEBP`, ..."""
    width: int
    height: int
    """As it is shown: after the rotation that a camera noted."""
    mode: str
    """PIL mode: `RGB`, `L`, `RGBA`, `P`, ..."""
    orientation: int = 1
    """EXIF orientation; 1 is upright."""


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes are a JPEG, judged by content and not by name."""
    return data[:3] == b"\xff\xd8\xff"


def read_header(data: bytes) -> ImageHeader:
    """Size and mode of an image.

    Raises:
        ValueError: the bytes are no image.
    """
    if not data:
        raise ValueError("the file is empty")
    has_exif = _has_exif(data)
    if is_jpeg(data) and not has_exif:
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise _damaged_jpeg(error) from None
        return ImageHeader("JPEG", width, height, _JPEG_MODES.get(colorspace, colorspace))
    with _open(data) as image:
        return _header(image, has_exif)


def _has_exif(data: bytes) -> bool:
    return b"Exif\x00\x00" in data[:4096] or b"eXIf" in data


def _header(image: Image.Image, has_exif: bool) -> ImageHeader:
    width, height = image.size
    orientation = int(image.getexif().get(_ORIENTATION, 1)) if has_exif else 1
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(image.format or "?", width, height, image.mode, orientation)


def decode_into(data: bytes, out: NDArray[np.uint8]) -> None:
    """Decode into `out` [H, W, C], C-contiguous uint8, where C is 3 (RGB) or 1 (grey).

    Raises:
        ValueError: the bytes are damaged or of another shape.
    """
    if is_jpeg(data):
        pixels = _decode_jpeg(data, out.shape[2], out)
        if pixels.shape != out.shape:
            raise ValueError(f"image is {pixels.shape}, expected {out.shape} (height, width, channels)")
        return
    pixels = _pixels(data)
    if pixels.shape != out.shape:
        raise ValueError(f"image is {pixels.shape}, expected {out.shape} (height, width, channels)")
    out[...] = pixels


def decode(data: bytes, header: ImageHeader | None = None) -> Image.Image:
    """Decode whole, strictly, upright, in its own mode; `header` is what `read_header` said, if it was asked.

    Raises:
        ValueError: the bytes are damaged, or no image.
    """
    if header is None and (is_jpeg(data) or not data):
        header = read_header(data)
    if header is not None and header.format == "JPEG" and header.mode in ("RGB", "L"):
        pixels = _decode_jpeg(data, 3 if header.mode == "RGB" else 1)
        image = Image.fromarray(pixels if header.mode == "RGB" else pixels[..., 0])
    else:
        image = _open(data)
        header = header or _header(image, _has_exif(data))
        if header.format == "PNG":
            _verify_png(data)
        _load(image)
    return image if header.orientation == 1 else _upright(image, header.orientation)


def _decode_jpeg(data: bytes, channels: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY", buffer=out)
    except ValueError as error:
        raise _damaged_jpeg(error) from None
    return pixels


def _damaged_jpeg(error: ValueError) -> ValueError:
    return ValueError(f"damaged JPEG ({error})")


def _pixels(data: bytes) -> NDArray[np.uint8]:
    image = _open(data)
    _load(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels are {pixels.dtype}, expected 8 bits")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # PIL's parsers raise whatever a damaged file makes them raise
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(f"not an image: it starts with {data[:12]!r}") from None
        raise ValueError(str(error) or type(error).__name__) from None


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from None


def _verify_png(data: bytes) -> None:
    """Check the checksums of all chunks, which decoding does not, and that the last one is there.

    Pillow's `verify` does so too, but uses the image up: the file would be parsed twice, which takes longer than this.
    """
    view, at, kind = memoryview(data), len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(view[at : at + 4])
        kind = bytes(view[at + 4 : at + 8])
        if end + 4 > len(data):
            raise ValueError(f"damaged PNG (it ends within the chunk that begins at byte {at})")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise ValueError(f"damaged PNG (wrong checksum of the chunk {kind!r} at byte {at})")
        at = end + 4


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    T = Image.Transpose
    turns = {
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_270,
        7: T.TRANSVERSE,
        8: T.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
