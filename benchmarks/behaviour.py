"""How each metric behaves when images get worse in known ways: noise, blur, JPEG, lost classes, copies.

Real images are split in two halves; one is the reference, the other is damaged more and more. A ratio is the share of
the steps at which a metric did not get worse; where it has to, the goal is 0. The values themselves are in the JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _common import Ratio, finish, parse_options
from _images import as_jpeg, real_images
from numpy.typing import NDArray
from torch.nn import functional as F

from bessemer.evaluation.evaluate import compare_images
from bessemer.evaluation.names import KINDS

Images = NDArray[np.uint8]


@dataclasses.dataclass
class _Facts:
    hash: str
    classes: tuple[str, ...]


class Memory:
    """Images in memory."""

    def __init__(self, name: str, images: Images, labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels
        self.manifest = _Facts(name, tuple(str(label) for label in range(10)))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, ids: NDArray[np.int64]) -> Images:
        return self.images[ids]


def noise(images: Images, strength: float) -> Images:
    """With Gaussian noise of this standard deviation, of 255."""
    noisy = images + np.random.default_rng(1).normal(size=images.shape) * strength
    return noisy.round().clip(0, 255).astype(np.uint8)


def blur(images: Images, sigma: float) -> Images:
    """With a Gaussian blur of this width in pixels."""
    if sigma == 0:
        return images
    x = torch.arange(-6, 7, dtype=torch.float32)
    line = torch.exp(-x.square() / (2 * sigma**2))
    kernel = (line / line.sum()).expand(3, 1, 1, 13)
    y = F.pad(torch.from_numpy(images).float(), (6, 6, 6, 6), mode="reflect")
    y = F.conv2d(F.conv2d(y, kernel, groups=3), kernel.mT, groups=3)
    return y.round().clamp(0, 255).to(torch.uint8).numpy()


def damaged(
    images: Images, labels: NDArray[np.int64], real: Images, real_labels: NDArray[np.int64]
) -> Iterator[tuple[str, float, Images, NDArray[np.int64]]]:
    """Kind, strength, images, labels; the first of each kind is undamaged."""
    for strength in (0, 5, 15, 40):
        yield "noise", strength, noise(images, strength), labels
    for sigma in (0, 0.5, 1, 2):
        yield "blur", sigma, blur(images, sigma), labels
    for quality in (100, 50, 20, 5):
        whole = quality == 100
        yield "jpeg", 100 - quality, images if whole else np.stack([as_jpeg(i, quality) for i in images]), labels
    for lost in (0, 5, 8):
        kept = np.resize(np.flatnonzero(labels >= lost), len(images))
        yield "lost classes", lost, images[kept], labels[kept]
    for share in (1, 4, 16):
        kept = np.resize(np.arange(len(images) // share), len(images))
        yield "duplicates", share, images[kept], labels[kept]
    for share in (0, 0.25, 1):
        count = int(len(images) * share)
        yield (
            "copied from the reference",
            share,
            np.concatenate([real[:count], images[count:]]),
            np.concatenate([real_labels[:count], labels[count:]]),
        )


# What each kind must see, by what it measures; every other pair is reported without a goal. Lost classes and duplicates
# repeat images, which distances of few images see as well.
MUST = {
    "kid": ("noise", "blur", "jpeg", "lost classes"),
    "fd": ("noise", "blur", "jpeg", "lost classes", "duplicates"),
    "fdinf": ("noise", "blur", "jpeg"),
    "recall": ("noise", "blur", "duplicates"),
    "coverage": ("noise", "blur", "jpeg", "lost classes", "duplicates"),
    "density": ("noise",),
    "precision": ("noise",),
    "memorised": ("copied from the reference",),
}


def run() -> int:
    """Compute, print, write."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    count, extractor = (60, "pixels") if options.quick else (250, "efflite0")
    name, images, labels = real_images(2 * count)
    real, fake = Memory("reference", images[:count], labels[:count]), (images[count:], labels[count:])
    metrics = [f"{kind}_{extractor}" for kind in KINDS if kind != "intrafd" and (kind != "is" or not options.quick)]
    table: dict[str, dict[str, list[tuple[float, float]]]] = {metric: {} for metric in metrics}
    better: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind, strength, damage, classes in damaged(*fake, real.images, real.labels):
            key = "undamaged" if np.array_equal(damage, fake[0]) else f"{kind}-{strength}"  # names kept features
            for record in compare_images(Memory(key, damage, classes), real, metrics, cache_dir=Path(cache)):
                table[record.metric].setdefault(kind, []).append((strength, record.value))
                better[record.metric] = record.higher_is_better
    found = []
    for metric, kinds in table.items():
        for kind, points in kinds.items():
            steps = list(itertools.pairwise(value for _, value in points))
            wrong = sum((b >= a) if better[metric] else (b <= a) for a, b in steps)
            required = kind in MUST.get(metric.partition("_")[0], ())
            goal = 0.0 if required and not options.quick else None
            found.append(Ratio(f"{metric}/{kind.replace(' ', '-')}", wrong / len(steps), goal))
    return finish(found, {"values": table, "images": name, "count": count}, options)


if __name__ == "__main__":
    sys.exit(run())
