"""Adaptive discriminator augmentation (Karras et al. 2020, arXiv:2006.06676), its classes b, g and c of appendix B.

Every transformation fires for each image by itself, with a probability that follows from p. Geometry is one affine
resampling between filters, colour one affine map, so the whole can be differentiated any number of times.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bessemer.nn.precision import full_precision
from bessemer.nn.update_state import UpdateStateLayer
from bessemer.nn.upfirdn import SYM6, filter_taps, upfirdn

__all__ = ["Augmentation", "colour_matrices", "geometry_matrices", "recolour", "warp"]

_REACH = 3
"""Pixels that a filter at twice the resolution sees to each side."""
_EXACT = 6
"""Pixels outside the image that are mirrored before upsampling."""

# Strengths of appendix B.
_TRANSLATE_INT = 0.125
_SCALE_STD = 0.2
_TRANSLATE_STD = 0.125
_BRIGHTNESS_STD = 0.2
_CONTRAST_STD = 0.5
_SATURATION_STD = 1.0


class _Draws:
    """Random numbers of n images, from one generator, in a fixed order whatever p is."""

    def __init__(self, n: int, p: Tensor, generator: Generator) -> None:
        self.n, self.p, self._generator = n, p, generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[n]."""
        r = torch.rand(self.n, generator=self._generator, device=self._generator.device)
        return r * (high - low) + low

    def normal(self) -> Tensor:
        """[n]."""
        return torch.randn(self.n, generator=self._generator, device=self._generator.device)

    def fires(self, value: Tensor, identity: float, p: Tensor | None = None) -> Tensor:
        """`value` [n] for the images in which the transformation fires, elsewhere what leaves an image as it is."""
        return torch.where(self.uniform() < (self.p if p is None else p), value, torch.full_like(value, identity))


def _matrix(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """[n, r, c] of entries that are [n] or constant."""
    return torch.stack(
        [torch.stack([torch.zeros_like(like) + entry for entry in row], 1) for row in rows],
        1,
    )


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], angle)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], x)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], x)


def geometry_matrices(n: int, p: Tensor, width: int, height: int, generator: Generator) -> Tensor:
    """Draw the geometry of n images.

    Args:
        n: images.
        p: [1], probability of augmentation.
        width: in pixels.
        height: in pixels.
        generator: source of randomness.

    Returns:
        [n, 3, 3]: from the coordinates of an output pixel to those of the input, homogeneous, in pixels from the centre
        of the image, x to the right and y down.
    """
    d = _Draws(n, p, generator)
    # G turns an input into an output, G = T_k…T_1; the inverse is T_1⁻¹…T_k⁻¹, so each step multiplies from the right.
    # Pixel blitting: flip, turn by quarters, shift by whole pixels.
    flip = d.fires(torch.where(d.uniform() < 0.5, -1.0, 1.0), 1)
    inverse = _scaling(flip, torch.ones_like(flip))
    quarters = d.fires((d.uniform() * 4).floor(), 0)
    inverse = inverse @ _rotation(-math.pi / 2 * quarters)
    x, y = (d.uniform(-_TRANSLATE_INT, _TRANSLATE_INT) for _ in range(2))
    fired = d.fires(torch.ones_like(x), 0)
    inverse = inverse @ _translation(-(x * width * fired).round(), -(y * height * fired).round())
    # General geometry. Two rotations that both may fire fire together with probability p.
    scale = d.fires(torch.exp2(_SCALE_STD * d.normal()), 1)
    inverse = inverse @ _scaling(1 / scale, 1 / scale)
    p_rotation = 1 - (1 - p).clamp(min=0).sqrt()
    inverse = inverse @ _rotation(-d.fires(d.uniform(-math.pi, math.pi), 0, p_rotation))
    stretch = d.fires(torch.exp2(_SCALE_STD * d.normal()), 1)
    inverse = inverse @ _scaling(1 / stretch, stretch)
    inverse = inverse @ _rotation(-d.fires(d.uniform(-math.pi, math.pi), 0, p_rotation))
    x, y = d.normal() * _TRANSLATE_STD, d.normal() * _TRANSLATE_STD
    fired = d.fires(torch.ones_like(x), 0)
    return inverse @ _translation(-x * width * fired, -y * height * fired)


def _mirrored(position: Tensor, size: int) -> Tensor:
    """Positions in pixels; those more than `_EXACT` outside mirrored about the first or the last pixel."""
    last = size - 1
    folded = last - (last - position.remainder(2 * last)).abs()
    inside = (position >= -_EXACT) & (position <= last + _EXACT)
    return torch.where(inside, position, folded)


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resample images [N, C, H, W], mirrored at their borders; `inverse` as :func:`geometry_matrices` makes it.

    They are upsampled twofold with :data:`SYM6`, read bilinearly, and downsampled with the same filter, which makes the
    identity exact. The paper mirrors before it upsamples, by as much as the geometry reaches; here `_EXACT` pixels are
    mirrored before and the rest after, so that shapes do not depend on the numbers drawn. Samples are taken to lie
    where the filter's centroid puts them: halfway between pixels, as for a symmetric filter, a flip would shift images
    by 0.4 pixels. Images are larger than `_EXACT` + `_REACH` pixels.
    """
    height, width = images.shape[2:]
    taps = filter_taps(SYM6, images)
    k, m = len(SYM6), _EXACT + _REACH
    # Pixel i of the padded image lies at sample 2i + offset.
    fine = upfirdn(F.pad(images, (m, m, m, m), mode="reflect"), taps, up=2, padding=(k // 2, k // 2 - 1))
    # The filter that goes down needs samples beyond the image: 2i - (k/2 - 1) to 2i + k/2 for pixel i.
    side = k // 2 - 1
    offset = sum(i * tap for i, tap in enumerate(SYM6)) / sum(SYM6) - side
    dtype, device = images.dtype, images.device
    xs, ys = (
        (torch.arange(2 * size + 2 * side, dtype=dtype, device=device) - side - offset) / 2 - (size - 1) / 2
        for size in (width, height)
    )
    inverse = inverse.to(dtype)
    x, y = (
        inverse[:, row, 0, None, None] * xs
        + inverse[:, row, 1, None, None] * ys[:, None]
        + inverse[:, row, 2, None, None]
        for row in (0, 1)
    )
    # Back from the centre to samples of the fine image, and to grid_sample's [-1, 1] from edge to edge.
    grid = torch.stack(
        [
            (4 * (_mirrored(position + (size - 1) / 2, size) + m) + 2 * offset + 1) / (2 * (size + 2 * m)) - 1
            for position, size in ((x, width), (y, height))
        ],
        3,
    )
    read = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return upfirdn(read, taps.flip(0), down=2)


def colour_matrices(n: int, p: Tensor, generator: Generator, *, colours: bool) -> Tensor:
    """Draw the colours of n images: [n, 4, 4], an affine map of (R, G, B, 1); hue and saturation only if `colours`."""
    d = _Draws(n, p, generator)
    axis = torch.tensor([1.0, 1.0, 1.0, 0.0], device=generator.device) / 3**0.5  # luma
    luma = axis[:, None] * axis
    eye = torch.eye(4, device=generator.device)
    rgb = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], device=generator.device))
    b = d.fires(_BRIGHTNESS_STD * d.normal(), 0)
    matrix = _matrix([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]], b)
    c = d.fires(torch.exp2(_CONTRAST_STD * d.normal()), 1)
    matrix = _matrix([[c, 0, 0, 0], [0, c, 0, 0], [0, 0, c, 0], [0, 0, 0, 1]], c) @ matrix
    flip = d.fires((d.uniform() < 0.5).float(), 0)
    matrix = (eye - 2 * luma * flip[:, None, None]) @ matrix
    if colours:
        angle = d.fires(d.uniform(-math.pi, math.pi), 0)[:, None, None]
        x = axis[0]
        cross = torch.zeros(4, 4, device=generator.device)
        cross[[1, 2, 0], [0, 1, 2]] = x
        cross[[0, 1, 2], [1, 2, 0]] = -x
        # Rodrigues: I + sin θ K + (1 - cos θ) K², and K² = luma - I on RGB.
        matrix = (eye + angle.sin() * cross + (1 - angle.cos()) * (luma - rgb)) @ matrix
        s = d.fires(torch.exp2(_SATURATION_STD * d.normal()), 1)[:, None, None]
        matrix = (luma + (rgb - luma) * s + (eye - rgb)) @ matrix
    return matrix


def recolour(images: Tensor, matrix: Tensor) -> Tensor:
    """Map the colours of images [N, 3 or 1, H, W] by `matrix` [N, 4, 4]; grey is R = G = B, and their mean."""
    matrix = matrix.to(images.dtype)
    n, channels = images.shape[:2]
    if channels == 1:
        row = matrix[:, :3].mean(1)
        return images * row[:, :3].sum(1).view(n, 1, 1, 1) + row[:, 3].view(n, 1, 1, 1)
    out = matrix[:, :3, :3] @ images.flatten(2) + matrix[:, :3, 3:]
    return out.view_as(images)


class Augmentation(UpdateStateLayer):
    """Augments images with probability p, and adapts p to how much the discriminator overfits (section 3).

    Args:
        p: at the start.
    """

    p: Tensor
    signs: Tensor
    count: Tensor
    sum_signs: Tensor
    sum_count: Tensor

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("p", torch.full((1,), p))
        self.register_buffer("signs", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("sum_signs", torch.zeros(1), persistent=False)
        self.register_buffer("sum_count", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor, generator: Generator) -> Tensor:
        """[N, C, H, W] -> the same shape, in full precision."""
        n, channels, height, width = images.shape
        with full_precision(images):
            images = warp(images, geometry_matrices(n, self.p, width, height, generator))
            return recolour(images, colour_matrices(n, self.p, generator, colours=channels == 3))

    @torch.no_grad()
    def observe(self, scores: Tensor) -> None:
        """Count the scores [N] of real images of one slice."""
        self.sum_signs += scores.detach().sign().sum()
        self.sum_count += len(scores)

    def begin_update(self) -> None:
        self.sum_signs.zero_()
        self.sum_count.zero_()

    def pending(self) -> list[Tensor]:
        return [self.sum_signs, self.sum_count]

    def end_update(self) -> None:
        self.signs += self.sum_signs
        self.count += self.sum_count

    @torch.no_grad()
    def adjust(self, target: float, kimg: float) -> None:
        """Move p up where r_t = E[sign(D(real))] since the last call exceeds the target, else down, within [0, 1].

        Args:
            target: of r_t.
            kimg: thousands of real images in which p moves by one.
        """
        r = self.signs / self.count.clamp(min=1)
        self.p.add_((r - target).sign() * self.count / (kimg * 1000)).clamp_(0, 1)
        self.signs.zero_()
        self.count.zero_()
