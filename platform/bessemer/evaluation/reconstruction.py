"""How well images are reconstructed, pair by pair: for autoencoders and compression."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bessemer.errors import EvaluationError
from bessemer.evaluation.images import ImageFiles, RealImages, read_in_groups
from bessemer.evaluation.lpips import Lpips

__all__ = ["Reconstruction", "compare_pairs", "psnr", "ssim"]

_WINDOW: Final = 11
_SIGMA: Final = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """[N] peak signal-to-noise ratio of each image in dB: ``10 log10(255^2 / mean squared error)``; infinite if equal.

    Args:
        images: [N, C, H, W] uint8.
        originals: likewise.

    Raises:
        EvaluationError: shapes or types that differ.
    """
    x, y = _pairs(images, originals)
    return 10 * torch.log10(255**2 / (x - y).square().flatten(1).mean(1))


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """[N] structural similarity of each image: 1 for equal ones.

    Wang et al., Image Quality Assessment, IEEE TIP 13(4), 2004, eqs. 13 to 17: a Gaussian window of 11 x 11 pixels and
    standard deviation 1.5, K1 = 0.01, K2 = 0.03; the mean over colours and over positions where the window fits.

    Args:
        images: [N, C, H, W] uint8, at least 11 x 11.
        originals: likewise.

    Raises:
        EvaluationError: shapes or types that differ, or images that are too small.
    """
    x, y = _pairs(images, originals)
    if min(x.shape[2:]) < _WINDOW:
        raise EvaluationError(f"ssim: images of {list(x.shape[2:])} are smaller than its window of {_WINDOW} pixels.")
    count = x.shape[0]
    x, y = (side.reshape(-1, 1, *side.shape[2:]) for side in (x, y))
    position = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    line = torch.exp(-position.square() / (2 * _SIGMA**2))
    line = (line / line.sum()).reshape(1, 1, 1, -1)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line), line.mT)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    cov = mean(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
    similarity = similarity / ((mean_x.square() + mean_y.square() + _C1) * (var_x + var_y + _C2))
    return similarity.reshape(count, -1).mean(1)


@dataclass(frozen=True)
class Reconstruction:
    """Means over pairs of images."""

    pairs: int
    psnr: float | None
    """Over the pairs that differ; None where all are equal."""
    ssim: float
    lpips: float | None
    """None where it was not asked for."""
    lpips_sha256: str
    """Hash of the weights of LPIPS; empty without."""
    equal: int
    """Pairs without any difference, whose PSNR is infinite."""
    images: str
    """Hash of the images."""
    originals: str
    """Hash of the originals."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_pairs(
    images: RealImages,
    originals: RealImages,
    *,
    lpips: Lpips | None = None,
    batch_size: int = 50,
    device: torch.device | str = "cpu",
) -> Reconstruction:
    """Compare two sets image by image, in their order: images in files are ordered by class and name.

    Args:
        images: reconstructed, such as by an autoencoder.
        originals: what they were made of.
        lpips: the perceptual distance, where it is wanted too.
        batch_size: pairs at a time.
        device: where to compute.

    Raises:
        EvaluationError: the sets differ in number, or two images of a pair in size.
    """
    if isinstance(images, ImageFiles) != isinstance(originals, ImageFiles):
        raise EvaluationError("pairs of images: packing a data set shuffles it; give two folders, or two packed sets.")
    if len(images) != len(originals):
        raise EvaluationError(f"pairs of images: {len(images)} and {len(originals)} cannot be paired; give as many.")
    ratios, similarities, distances = [], [], []
    for start in range(0, len(images), batch_size):
        ids = np.arange(start, min(start + batch_size, len(images)))
        left, right = (_one_by_one(read_in_groups(side, ids)) for side in (images, originals))
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, (image, original) in enumerate(zip(left, right, strict=True)):
            if image.shape != original.shape:
                raise EvaluationError(
                    f"pairs of images: number {start + position} is {list(image.shape)} in the one set and "
                    f"{list(original.shape)} in the other (channels, height, width); give pairs of one size."
                )
            groups.setdefault(image.shape, []).append(position)
        for positions in groups.values():
            x, y = (torch.from_numpy(np.stack([side[p] for p in positions])).to(device) for side in (left, right))
            ratios.append(psnr(x, y))
            similarities.append(ssim(x, y))
            if lpips is not None:
                distances.append(lpips.distance(x, y))
    ratio, similarity = torch.cat(ratios), torch.cat(similarities)
    finite = ratio[ratio.isfinite()]
    return Reconstruction(
        pairs=len(images),
        psnr=float(finite.mean()) if len(finite) else None,
        ssim=float(similarity.mean()),
        lpips=float(torch.cat(distances).double().mean()) if distances else None,
        lpips_sha256=lpips.weights_sha256 if lpips is not None else "",
        equal=len(ratio) - len(finite),
        images=images.manifest.hash,
        originals=originals.manifest.hash,
    )


def _pairs(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != originals.shape or images.ndim != 4 or {images.dtype, originals.dtype} != {torch.uint8}:
        raise EvaluationError(
            f"pairs of images: {images.dtype} {list(images.shape)} and {originals.dtype} {list(originals.shape)}, but "
            "both must be uint8 of one shape [N, C, H, W]."
        )
    return images.double(), originals.double()


def _one_by_one(groups: list[tuple[NDArray[np.int64], NDArray[np.uint8]]]) -> list[NDArray[np.uint8]]:
    found = {int(p): image for positions, images in groups for p, image in zip(positions, images, strict=True)}
    return [found[position] for position in range(len(found))]
