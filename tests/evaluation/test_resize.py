import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer

from bessemer.evaluation.resize import bicubic_weights, resize_bicubic

SIZES = [(8, 224), (32, 224), (32, 299), (64, 299), (300, 299), (512, 224), (299, 299), (100, 33)]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resizing_equals_clean_fid(old: int, new: int) -> None:
    image = np.random.default_rng(old).integers(0, 256, (old, old, 3), dtype=np.uint8)
    image[: old // 2] = image[: old // 2] // 128 * 255  # hard edges overshoot, and are clamped
    expected = make_resizer("PIL", False, "bicubic", (new, new))(image)
    found = resize_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], new)[0].permute(1, 2, 0).numpy()
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2e-4  # of 255


def test_height_and_width_may_differ() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    expected = make_resizer("PIL", False, "bicubic", (50, 50))(image)
    found = resize_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], 50)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 2e-4


@pytest.mark.parametrize(("old", "new"), [(7, 20), (20, 7), (32, 224)])
def test_weights_keep_constants_and_are_symmetric(old: int, new: int) -> None:
    weights = bicubic_weights(old, new)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-14)


def test_images_of_a_batch_do_not_mix() -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    together = resize_bicubic(images, 40)
    for i in range(3):
        torch.testing.assert_close(together[i], resize_bicubic(images[i : i + 1], 40)[0])
