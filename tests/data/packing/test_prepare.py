import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from bessemer.data.packing.prepare import Prepared, Resize, Rules, prepare

Draw = Callable[..., Image.Image]
Encode = Callable[..., bytes]

AS_IS = Rules(size=None, resize="none", mode=None)


def pixels(prepared: Prepared) -> np.ndarray:
    image = Image.open(io.BytesIO(prepared.data))
    assert (image.format, image.size, image.mode) == (
        {"jpg": "JPEG", "png": "PNG"}[prepared.ending],
        (prepared.width, prepared.height),
        prepared.mode,
    )
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("rules", [AS_IS, Rules(16, "lanczos", None)])
def test_what_fits_is_passed_through(draw: Draw, encode: Encode, kind: str, mode: str, rules: Rules) -> None:
    data = encode(draw(0, (16, 16), mode), kind)
    prepared = prepare(data, rules)
    assert prepared.data == data
    assert prepared.passed_through
    assert pixels(prepared).shape[:2] == (16, 16)


@pytest.mark.parametrize("resize", ["lanczos", "box", "bicubic"])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (25, 40), (12, 12), (64, 64)])
def test_centre_crop_and_resize(draw: Draw, encode: Encode, resize: Resize, size: tuple[int, int]) -> None:
    image = draw(1, size)
    prepared = prepare(encode(image), Rules(16, resize, None))
    edge = min(size)
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    square = Image.fromarray(np.asarray(image)[top : top + edge, left : left + edge])
    expected = square.resize((16, 16), Image.Resampling[resize.upper()])
    assert not prepared.passed_through
    assert np.array_equal(pixels(prepared), np.asarray(expected))


def test_resize_none_cuts_out_the_centre(draw: Draw, encode: Encode) -> None:
    image = draw(2, (40, 24))
    prepared = prepare(encode(image), Rules(16, "none", None))
    assert np.array_equal(pixels(prepared), np.asarray(image)[4:20, 12:28])
    with pytest.raises(ValueError, match=r"40x24 is smaller than 32x32; resize none cannot enlarge"):
        prepare(encode(image), Rules(32, "none", None))


def test_transparency_is_laid_over_white(encode: Encode) -> None:
    image = np.zeros((16, 16, 4), dtype=np.uint8)
    image[:, 8:, 3] = 255  # black; the left half is transparent
    palette = Image.fromarray(image).quantize(8)
    for data in (encode(Image.fromarray(image)), encode(palette), encode(Image.fromarray(image).convert("LA"))):
        for mode in ("RGB", "L"):
            result = pixels(prepare(data, Rules(None, "none", mode)))  # type: ignore[arg-type]
            assert (result[:, :8] == 255).all()
            assert (result[:, 8:] == 0).all()


@pytest.mark.parametrize("source", ["L", "RGB", "P", "1", "CMYK"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_mode_converts(draw: Draw, encode: Encode, source: str, mode: str) -> None:
    kind = "JPEG" if source == "CMYK" else "PNG"
    data = encode(draw(3).convert(source), kind)
    expected = Image.open(io.BytesIO(data)).convert(mode)
    prepared = prepare(data, Rules(None, "none", mode))  # type: ignore[arg-type]
    assert prepared.passed_through == (source == mode)
    assert np.array_equal(pixels(prepared), np.asarray(expected))


@pytest.mark.parametrize("kind", ["WEBP", "BMP"])
def test_other_formats_become_png(draw: Draw, encode: Encode, kind: str) -> None:
    data = encode(draw(4), kind)
    prepared = prepare(data, AS_IS)
    assert prepared.ending == "png"
    assert np.array_equal(pixels(prepared), np.asarray(Image.open(io.BytesIO(data))))


def test_modes_that_are_not_stored_are_reported_not_stored(draw: Draw, encode: Encode) -> None:
    prepared = prepare(encode(draw(5, mode="RGBA")), AS_IS)
    assert (prepared.mode, prepared.data) == ("RGBA", b"")


def test_a_rotated_photo_is_turned_upright(draw: Draw, encode: Encode) -> None:
    image = draw(6, (16, 16))
    exif = Image.Exif()
    exif[0x0112] = 3
    prepared = prepare(encode(image, exif=exif.tobytes()), AS_IS)
    assert not prepared.passed_through
    assert np.array_equal(pixels(prepared), np.asarray(image)[::-1, ::-1])


def test_deep_pixels_are_refused(encode: Encode) -> None:
    deep = Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits"):
        prepare(encode(deep), Rules(None, "none", "L"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("rules", [AS_IS, Rules(8, "box", "L")])
def test_truncated_images_are_refused(draw: Draw, encode: Encode, kind: str, rules: Rules) -> None:
    data = encode(draw(7), kind)
    with pytest.raises(ValueError):
        prepare(data[: len(data) * 3 // 4], rules)
