import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from bessemer.data.reading.decode import decode, decode_into, is_jpeg, read_header

Draw = Callable[..., Image.Image]
Encode = Callable[..., bytes]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 75}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0}), ("PNG", {})],
)
def test_pixels_equal_pil(draw: Draw, encode: Encode, mode: str, kind: str, options: dict[str, object]) -> None:
    data = encode(draw(1, (40, 24), mode), kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(data))).reshape(24, 40, -1)
    out = np.empty(expected.shape, dtype=np.uint8)
    decode_into(data, out)
    assert np.array_equal(out, expected)
    header = read_header(data)
    assert (header.format, header.width, header.height, header.mode) == (kind, 40, 24, mode)
    assert np.array_equal(np.asarray(decode(data, header)).reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_other_shapes_are_refused(draw: Draw, encode: Encode, kind: str) -> None:
    data = encode(draw(1, (16, 16)), kind)
    for shape in ((16, 17, 3), (15, 16, 3), (32, 32, 3), (8, 8, 3)):
        with pytest.raises(ValueError):
            decode_into(data, np.empty(shape, dtype=np.uint8))
    with pytest.raises(ValueError):
        decode_into(encode(draw(1, (16, 16), "L")), np.empty((16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_cut_is_found(draw: Draw, encode: Encode, kind: str) -> None:
    data = encode(draw(2, (16, 16)), kind)
    # Without the checksum of its empty last chunk a PNG is still all there.
    last = len(data) - 4 if kind == "PNG" else len(data)
    for length in range(0, last, max(1, last // 100)):
        with pytest.raises(ValueError):
            decode(data[:length], read_header(data[:length]))


def test_changed_png_pixels_are_found(draw: Draw, encode: Encode) -> None:
    image = draw(3, (16, 16))
    data = encode(image)
    found = 0
    for place in range(8, len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        try:
            pixels = np.asarray(decode(bytes(changed), read_header(bytes(changed))))
        except ValueError:
            found += 1
            continue
        assert np.array_equal(pixels, np.asarray(image))
    assert found > 0.9 * len(data)


@pytest.mark.parametrize("data", [b"", b"hello, world", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_header(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_rotation_is_applied(draw: Draw, encode: Encode, orientation: int, kind: str) -> None:
    image = draw(4, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif.tobytes())
    header = read_header(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (header.width, header.height, header.orientation) == (*expected.size, orientation)
    assert np.array_equal(np.asarray(decode(data, header)), np.asarray(expected))


def test_jpeg_is_told_by_content(draw: Draw, encode: Encode) -> None:
    assert is_jpeg(encode(draw(0), "JPEG"))
    assert not is_jpeg(encode(draw(0), "PNG"))
