"""What a sample holds: its fields, how they are stored, and how they come out of the decoder.

A data set is of one kind, and the kind says which fields a batch has:

======== =================== ===========================================================================
kind     fields              a sample
======== =================== ===========================================================================
images   images              one image
pairs    images, targets     an image and the one that belongs to it
domains  images, others      an image of one domain or of the other; each has an order of its own
clips    clips               the frames of a video
audio    audio               a piece of sound, one channel
bits     bits                a vector of 0 and 1
======== =================== ===========================================================================
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bessemer.data.reading.decode import decode_into

__all__ = ["KINDS", "NOUNS", "FieldName", "FieldRecord", "Kind", "bits_file", "describe", "wave_file"]

Kind = Literal["images", "pairs", "domains", "clips", "audio", "bits"]
FieldName = Literal["images", "targets", "others", "clips", "audio", "bits"]

KINDS: dict[Kind, tuple[FieldName, ...]] = {
    "images": ("images",),
    "pairs": ("images", "targets"),
    "domains": ("images", "others"),
    "clips": ("clips",),
    "audio": ("audio",),
    "bits": ("bits",),
}
"""Kind -> fields of a batch, the main one first."""
NOUNS: dict[str, str] = {
    "images": "images",
    "pairs": "pairs",
    "domains": "images",
    "clips": "clips",
    "audio": "pieces of sound",
    "bits": "vectors",
}
"""Kind -> what its samples are called."""

Edge = Annotated[int, Field(ge=1, le=1 << 28)]


class FieldRecord(BaseModel):
    """A field of a batch, as the manifest declares it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    name: FieldName
    shape: list[Edge]
    """Of one sample in a batch: [C, H, W] pictures, [T, C, H, W] clips, [samples] sound, [bits]."""
    encoding: Literal["jpg", "png", "mixed", "wav", "npy"]
    """How it is stored: JPEG or PNG, one file per frame; 16-bit PCM; packed bits as a NumPy array of bytes."""
    rate: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Samples of sound per second."""

    @model_validator(mode="after")
    def _check_shape(self) -> FieldRecord:
        rank = {"clips": 4, "audio": 1, "bits": 1}.get(self.name, 3)
        encodings = {"audio": ("wav",), "bits": ("npy",)}.get(self.name, ("jpg", "png", "mixed"))
        if len(self.shape) != rank or self.encoding not in encodings:
            raise ValueError(f"{self.name} of shape {self.shape} as {self.encoding}: not what such a field can be")
        if self.is_picture and (self.shape[-1] != self.shape[-2] or self.shape[-3] not in (1, 3)):
            raise ValueError(f"{self.name} of shape {self.shape}: pictures are square, of 1 or 3 channels")
        if (self.rate is None) != (self.name != "audio"):
            raise ValueError(f"{self.name} with rate {self.rate}: sound has a rate, and nothing else has")
        return self

    @property
    def is_picture(self) -> bool:
        """Whether it is made of pixels: images and clips."""
        return self.name not in ("audio", "bits")

    @property
    def members(self) -> int:
        """Files of a sample that hold it: one, or one per frame."""
        return self.shape[0] if self.name == "clips" else 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one sample as the decoder leaves it: [H, W, C] pixels, frames of them, samples of sound, bytes of bits."""
        if self.name == "bits":
            return (-(-self.shape[0] // 8),)
        if not self.is_picture:
            return tuple(self.shape)
        *frames, channels, height, width = self.shape
        return (*frames, height, width, channels)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """uint8, and int16 for sound."""
        return np.dtype(np.int16 if self.name == "audio" else np.uint8)

    @property
    def stored_bytes(self) -> int:
        """Bytes of one sample in memory."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    def decode(self, data: bytes, out: NDArray[Any]) -> None:
        """Decode one file of a sample into `out`: all of the field, or one frame.

        Raises:
            ValueError: the bytes are damaged, or something else than the field.
        """
        if self.is_picture:
            decode_into(data, out)
        elif self.name == "audio":
            out[...] = _read_wave(data, self.rate or 0, len(out))
        else:
            out[...] = _read_bits(data, self.shape[0])

    def laid_out(self, stored: NDArray[Any]) -> NDArray[Any]:
        """From [N, *stored_shape] to [N, *shape]: channels before pixels, a byte for each bit."""
        if self.name == "audio":
            return stored
        if self.name == "bits":
            return np.unpackbits(stored, axis=1, count=self.shape[0])
        return np.ascontiguousarray(np.moveaxis(stored, -1, -3))


def describe(name: str, shape: Sequence[int], rate: int | None = None) -> str:
    """A field in words: `64x64 RGB`, `16 frames of 64x64 grey`, `16000 samples at 16000 Hz`, `784 bits`."""
    if name == "bits":
        return f"{shape[0]} bits"
    if name == "audio":
        return f"{shape[0]} samples at {rate} Hz ({shape[0] / (rate or 1):.3g} s)"
    picture = f"{shape[-1]}x{shape[-2]} {'RGB' if shape[-3] == 3 else 'grey'}"
    return f"{shape[0]} frames of {picture}" if name == "clips" else picture


def wave_file(sound: NDArray[np.int16], rate: int) -> bytes:
    """Sound [samples] as a WAV file: 16-bit PCM, one channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(sound.astype("<i2", copy=False).tobytes())
    return file.getvalue()


def _read_wave(data: bytes, rate: int, count: int) -> NDArray[np.int16]:
    try:
        with wave.open(io.BytesIO(data)) as reader:
            found = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate(), reader.getnframes())
            frames = reader.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"damaged WAV ({error or 'cut off'})") from None
    if found != (1, 2, rate, count) or len(frames) != 2 * count:
        raise ValueError(
            f"sound of {found[0]} channels, {8 * found[1]} bits, {found[2]} Hz and {found[3]} samples, expected one "
            f"channel, 16 bits, {rate} Hz and {count} samples"
        )
    return np.frombuffer(frames, dtype="<i2")


def bits_file(bits: NDArray[np.uint8]) -> bytes:
    """A vector [bits] of 0 and 1 as an .npy file of packed bytes, the first bit of a byte being its highest."""
    packed = np.packbits(bits)
    return _bits_header(len(packed)) + packed.tobytes()


def _bits_header(count: int) -> bytes:
    """Header of a version 1.0 .npy file of `count` bytes, the same with every NumPy."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},), }}".encode()
    padding = -(10 + len(text) + 1) % 64
    body = text + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _read_bits(data: bytes, count: int) -> NDArray[np.uint8]:
    size = -(-count // 8)
    header = _bits_header(size)
    if not data.startswith(header) or len(data) != len(header) + size:
        raise ValueError(f"{len(data)} bytes that are not {count} packed bits in a NumPy file")
    packed = np.frombuffer(data, dtype=np.uint8, offset=len(header))
    if count % 8 and int(packed[-1]) & ((1 << -count % 8) - 1):
        raise ValueError(f"bits behind the last of {count} are set")
    return packed
