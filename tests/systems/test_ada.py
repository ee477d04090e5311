import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from bessemer.nn.update_state import begin_update, end_update
from bessemer.nn.upfirdn import SYM6
from bessemer.systems.adversarial.ada import Augmentation, colour_matrices, geometry_matrices, recolour, warp

ONE, ZERO = torch.ones(1), torch.zeros(1)


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(n: int = 2, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    """Noise with little in the highest frequencies, float64."""
    noise = torch.randn(n, channels, size, size, generator=_g(seed), dtype=torch.float64)
    smooth = ndimage.gaussian_filter(noise.numpy(), (0, 0, 1.5, 1.5), mode="mirror")
    return torch.from_numpy(smooth / smooth.std())


def _affine(angle: float = 0.0, x_scale: float = 1.0, y_scale: float = 1.0, x: float = 0.0, y: float = 0.0) -> Tensor:
    """[1, 3, 3], output coordinates to input coordinates."""
    c, s = math.cos(angle), math.sin(angle)
    rows = [[c * x_scale, -s * y_scale, x], [s * x_scale, c * y_scale, y], [0, 0, 1]]
    return torch.tensor([rows], dtype=torch.float64)


def _resampled(image: np.ndarray, inverse: np.ndarray, margin: int = 40) -> np.ndarray:
    """[H, W] by other means: NumPy's mirror, convolutions written out, scipy's bilinear reading; mirrored first."""
    size, h = len(image), np.array(SYM6)
    fine = np.pad(image, margin, mode="reflect")
    for axis in (0, 1):
        spread = np.zeros([2 * n if a == axis else n for a, n in enumerate(fine.shape)])
        spread[(slice(None, None, 2), slice(None)) if axis == 0 else (slice(None), slice(None, None, 2))] = fine
        fine = np.apply_along_axis(lambda line: np.convolve(line, h)[6 : 6 + len(line)], axis, spread)
    # Pixel i comes to lie at sample 2i + centroid - 6. The grid goes five samples beyond the image, for the way down.
    centroid = (np.arange(12) * h).sum() / h.sum()
    at = (np.arange(2 * size + 10) - 5 - (centroid - 5)) / 2 - (size - 1) / 2
    ys, xs = np.meshgrid(at, at, indexing="ij")
    u = inverse[0, 0] * xs + inverse[0, 1] * ys + inverse[0, 2]
    v = inverse[1, 0] * xs + inverse[1, 1] * ys + inverse[1, 2]
    place = [2 * (position + (size - 1) / 2 + margin) + centroid - 6 for position in (v, u)]
    read = ndimage.map_coordinates(fine, place, order=1)
    for axis in (0, 1):
        read = np.apply_along_axis(lambda line: np.convolve(line, h[::-1], mode="valid")[::2], axis, read)
    return read


@pytest.mark.parametrize("channels", [1, 3])
def test_p_zero_is_the_identity(channels: int) -> None:
    images = torch.rand(4, channels, 16, 16, generator=_g()) * 2 - 1
    augment = Augmentation(0.0)
    torch.testing.assert_close(augment(images.double(), _g(1)), images.double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(augment(images, _g(1)), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "inverse",
    [
        _affine(),
        _affine(x=2.0, y=-1.0),
        _affine(x=-0.3, y=0.8),
        _affine(0.1, 0.95, 1.0, 0.4, -0.3),
        _affine(0.4, 0.6, 0.55),
        _affine(math.pi / 2),
    ],
    ids=["identity", "shift", "part shift", "all", "enlarge", "quarter"],
)
def test_geometry_equals_an_independent_resampling(inverse: Tensor) -> None:
    images = _images()
    actual = warp(images, inverse.expand(2, -1, -1))
    for image, out in zip(images.flatten(0, 1), actual.flatten(0, 1), strict=True):
        np.testing.assert_allclose(out.numpy(), _resampled(image.numpy(), inverse[0].numpy()), atol=2e-9)


def test_far_beyond_the_border_images_are_mirrored() -> None:
    images, inverse = _images(), _affine(0.7, 1.9, 1.6, 9.0, -7.0)
    actual = warp(images, inverse.expand(2, -1, -1)).flatten(0, 1).numpy()
    expected = np.stack([_resampled(i.numpy(), inverse[0].numpy()) for i in images.flatten(0, 1)])
    # The filter is not quite symmetric, so mirroring after it differs a little from mirroring before it.
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.05
    assert expected.std() > 0.5


@pytest.mark.parametrize(
    ("inverse", "expected"),
    [
        (_affine(x_scale=-1), lambda x: x.flip(3)),
        (_affine(-math.pi / 2), lambda x: x.rot90(-1, (2, 3))),
        (_affine(math.pi), lambda x: x.flip(2, 3)),
        (_affine(x=-3, y=2), lambda x: F.pad(x, (3, 0, 0, 2), mode="reflect")[:, :, 2:, :16]),
    ],
    ids=["flip", "quarter", "half turn", "shift"],
)
def test_what_needs_no_resampling_moves_pixels(inverse: Tensor, expected: object) -> None:
    images = _images()
    difference = warp(images, inverse.expand(2, -1, -1)) - expected(images)  # type: ignore[operator]
    assert difference.square().mean().sqrt() < 0.04
    assert images.std() > 0.5


def test_drawn_geometry_has_the_papers_distributions() -> None:
    n, size = 40_000, 64
    linear = geometry_matrices(n, ONE, size, size, _g())[:, :2, :2].double()
    determinant, singular = torch.linalg.det(linear), torch.linalg.svdvals(linear)
    assert (determinant < 0).double().mean().item() == pytest.approx(0.5, abs=0.01)  # flips
    assert (determinant.abs().log2() / 2).std().item() == pytest.approx(0.2, rel=0.02)  # isotropic
    stretch = (singular[:, 0] / singular[:, 1]).log2() / 2  # |N(0, 0.2²)|
    assert stretch.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])  # uniform: both rotations and quarters
    assert torch.histc(angle, 8, -math.pi, math.pi).div(n / 8).sub(1).abs().max() < 0.08
    shift = geometry_matrices(n, ONE, size, size, _g())[:, :2, 2].double() / size
    ways = math.exp(2 * (0.2 * math.log(2)) ** 2)  # E[1/scale²] = E[stretch²]
    assert shift.std(0).tolist() == pytest.approx([math.sqrt(0.25**2 / 12 + 0.125**2 * ways * ways)] * 2, rel=0.03)


def test_p_is_the_probability_of_each_transformation() -> None:
    n, p = 20_000, 0.3
    matrices = geometry_matrices(n, torch.tensor([p]), 32, 32, _g())
    identity = (matrices == torch.eye(3)).all(2).all(1).double().mean().item()
    # Flip and quarter turns are the identity in one draw of two and of four; the rotations share one p; six more fire.
    # An integer shift of U(-4, 4) pixels in both directions rounds to none with probability 1/64.
    none = 1 - p * (1 - 1 / 64)
    assert identity == pytest.approx((1 - p / 2) * (1 - 3 * p / 4) * none * (1 - p) ** 4, abs=0.01)
    colours = colour_matrices(n, torch.tensor([p]), _g(), colours=True)
    same = torch.isclose(colours, torch.eye(4), atol=1e-6).all(2).all(1).double().mean().item()
    assert same == pytest.approx((1 - p) ** 4 * (1 - p / 2), abs=0.01)


def test_drawn_colours_have_the_papers_distributions() -> None:
    matrices = colour_matrices(40_000, ONE, _g(), colours=True).double()
    assert torch.equal(matrices[:, 3], torch.tensor([0.0, 0, 0, 1]).double().expand(40_000, -1))
    grey = torch.ones(3, dtype=torch.float64) / 3**0.5
    u = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / 2**0.5
    v = torch.linalg.cross(grey, u)
    A, offset = matrices[:, :3, :3], matrices[:, :3, 3]
    along = A @ grey
    contrast = along @ grey  # with the sign of the luma flip
    torch.testing.assert_close(along, contrast[:, None] * grey, rtol=0, atol=1e-5)  # grey stays grey
    torch.testing.assert_close(offset, offset[:, :1].expand(-1, 3), rtol=0, atol=1e-5)
    assert (contrast < 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert contrast.abs().log2().std().item() == pytest.approx(0.5, rel=0.02)
    assert (offset[:, 0] / contrast).std().item() == pytest.approx(0.2, rel=0.02)  # brightness comes first
    plane = torch.stack([torch.stack([(A @ b) @ a for b in (u, v)], 1) for a in (u, v)], 1)
    length = torch.linalg.det(plane).sqrt()  # chroma is turned and scaled, never mirrored
    torch.testing.assert_close(plane @ plane.mT, length[:, None, None] ** 2 * torch.eye(2), rtol=1e-4, atol=1e-4)
    assert (length / contrast.abs()).log2().std().item() == pytest.approx(1.0, rel=0.02)
    angle = torch.atan2(plane[:, 1, 0], plane[:, 0, 0])
    assert torch.histc(angle, 8, -math.pi, math.pi).div(5_000).sub(1).abs().max() < 0.08


def test_recolour_pixel_by_pixel() -> None:
    images, matrices = _images(2, size=4), colour_matrices(2, ONE, _g(), colours=True).double()
    out = recolour(images, matrices)
    for n in range(2):
        for y in range(4):
            for x in range(4):
                pixel = torch.cat([images[n, :, y, x], torch.ones(1)])
                torch.testing.assert_close(out[n, :, y, x], (matrices[n] @ pixel)[:3])
    grey = images[:, :1]
    expected = recolour(grey.expand(-1, 3, -1, -1), matrices).mean(1, keepdim=True)
    torch.testing.assert_close(recolour(grey, matrices), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_second_derivatives_at_p_one(channels: int) -> None:
    """Every operation is on; those of hue and saturation in colour."""
    images = _images(1, channels, 10).requires_grad_()
    inverse = geometry_matrices(1, ONE, 10, 10, _g(3)).double()
    matrix = colour_matrices(1, ONE, _g(4), colours=channels == 3).double()

    def squared(x: Tensor) -> Tensor:
        return recolour(warp(x, inverse), matrix).square().mean((2, 3))

    assert torch.autograd.gradcheck(squared, images)
    assert torch.autograd.gradgradcheck(squared, images)


def test_images_are_augmented_each_by_its_own_draws() -> None:
    images = _images(1).expand(8, -1, -1, -1)
    out = Augmentation(1.0)(images, _g(1))
    assert torch.pdist(out.flatten(1)).min() > 1
    assert torch.equal(out, Augmentation(1.0)(images, _g(1)))
    state = torch.get_rng_state()
    assert not torch.equal(out, Augmentation(1.0)(images, _g(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_p_follows_the_sign_of_real_scores_and_stays_in_bounds() -> None:
    augment = Augmentation()

    def see(scores: list[float]) -> float:
        begin_update([augment])
        augment.observe(torch.tensor(scores))
        end_update([augment])
        augment.adjust(0.6, 0.01)  # ten images move p from 0 to 1
        return augment.p.item()

    assert see([1, 1, 1]) == pytest.approx(0.3)
    assert see([1, 1, 1, 1, -1]) == pytest.approx(0.3), "r = 0.6: neither too much nor too little"
    assert see([1, 1, -1]) == pytest.approx(0)
    assert see([-1, -1]) == 0
    for _ in range(4):
        p = see([3, 0.1, 2, 5])
    assert p == 1
    augment.adjust(0.6, 0.01)
    assert augment.p.item() == 1, "no images seen, nothing to say"


def test_signs_are_summed_over_workers_and_count_only_when_accepted() -> None:
    pair = [Augmentation(0.5), Augmentation(0.5)]
    for worker, scores in zip(pair, ([1.0, 1.0], [1.0, -1.0]), strict=True):
        begin_update([worker])
        worker.observe(torch.tensor([-9.0]))  # an update that was rejected: never closed
        begin_update([worker])
        worker.observe(torch.tensor(scores))
    total = sum(torch.cat(worker.pending()) for worker in pair)
    for worker in pair:
        end_update([worker], all_reduce=lambda flat: flat.copy_(total))
        assert (worker.signs.item(), worker.count.item()) == (2, 4)
        worker.adjust(0.6, 1)
        assert worker.p.item() == pytest.approx(0.5 - 0.004)
