"""How each metric behaves when images get worse in known ways: noise, blur, JPEG, lost classes, copies.

Real images are split in two halves; one is the reference, the other is damaged more and more. The table `EXPECTED` says
what each metric has to make of each damage: to get worse at every step, to be blind to it by its nature, or to get
better, with the reason. A ratio is the share of the steps at which it did not; the goal is 0. The values are in the
JSON. What compares clips is given windows that pan over the images, and what compares pairs the images as they were.

Two metrics are not here: `intrafd` would need as many images of each class, and path lengths see no images.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from _common import Ratio, finish, parse_options
from _images import as_jpeg, real_images
from numpy.typing import NDArray
from torch.nn import functional as F

from bessemer.evaluation.evaluate import compare_images
from bessemer.evaluation.names import CLIP_KINDS, KINDS, parse_metric
from bessemer.evaluation.reconstruction import psnr, ssim

Images = NDArray[np.uint8]
Table = dict[str, dict[str, list[tuple[float, float]]]]
"""Metric -> damage -> strengths and values."""


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
    for sigma in (0, 0.75, 1.25, 2):
        yield "blur", sigma, blur(images, sigma), labels
    for quality in (100, 50, 10, 4):
        whole = quality == 100
        yield "jpeg", 100 - quality, images if whole else np.stack([as_jpeg(i, quality) for i in images]), labels
    for lost in (0, 5, 8):
        kept = np.resize(np.flatnonzero(labels >= lost), len(images))
        yield "lost classes", lost, images[kept], labels[kept]
    for share in (1, 2, 16):
        kept = np.resize(np.arange(len(images) // share), len(images))
        yield "duplicates", share, images[kept], labels[kept]
    for share in (0, 0.25, 1):
        count = int(len(images) * share)
        yield (
            "copies",
            share,
            np.concatenate([real[:count], images[count:]]),
            np.concatenate([real_labels[:count], labels[count:]]),
        )


def clips(images: Images) -> NDArray[np.uint8]:
    """[n, 6, 3, 24, 24]: a window that pans over each image, in a random direction."""
    rng = np.random.default_rng(2)
    starts, steps = rng.integers(0, 9, (len(images), 2)), rng.integers(-1, 2, (len(images), 2))
    found = []
    for image, start, step in zip(images, starts, steps, strict=True):
        corners = [np.clip(start + step * t, 0, 8) for t in range(6)]
        found.append(np.stack([image[:, y : y + 24, x : x + 24] for y, x in corners]))
    return np.stack(found)


def damaged_clips(whole: NDArray[np.uint8]) -> Iterator[tuple[str, float, NDArray[np.uint8]]]:
    """Kind, strength and clips; the first of each kind is undamaged."""
    for kind, damage, strengths in (("noise", noise, (0, 5, 15, 40)), ("blur", blur, (0, 0.75, 1.25, 2))):
        for strength in strengths:
            yield kind, strength, damage(np.concatenate(whole), strength).reshape(whole.shape)
    rng = np.random.default_rng(3)
    for share in (0, 0.25, 1):
        mixed = whole.copy()
        for clip in mixed[: int(len(mixed) * share)]:
            clip[:] = clip[rng.permutation(len(clip))]
        yield "order", share, mixed
    for share in (0, 0.25, 1):
        still = whole.copy()
        still[: int(len(still) * share)] = still[: int(len(still) * share), :1]
        yield "frozen", share, still


class Expected(NamedTuple):
    """What a kind of metric must say of a damage, and why where that is not `worse`."""

    verdict: Literal["worse", "blind", "better"]
    """At every step; `blind`: the mildest one makes it worse by less than a tenth."""
    why: str = ""


WORSE = Expected("worse")
_DISTANCE = {
    **dict.fromkeys(("noise", "blur", "jpeg", "lost classes", "duplicates"), WORSE),
    "copies": Expected("better", "a copy of the reference is a perfect sample; only `memorised` asks where it is from"),
}
_ALONE = "it asks of each generated image alone, not what is missing"
_SMOOTH = "what is a little smoother lies in the dense middle of the real images"
_SUSPECT = Expected("better", "what is damaged is further from every real image, and so less suspect")
EXPECTED: dict[str, dict[str, Expected]] = {
    "kid": _DISTANCE,
    "fd": _DISTANCE,
    "fdinf": _DISTANCE,
    "recall": _DISTANCE,
    "coverage": _DISTANCE,
    "cas": _DISTANCE,
    "precision": {
        "noise": WORSE,
        "jpeg": WORSE,
        "blur": Expected("blind", _SMOOTH),
        "lost classes": Expected("blind", _ALONE),
        "duplicates": Expected("blind", _ALONE),
        "copies": _DISTANCE["copies"],
    },
    "density": {
        "noise": WORSE,
        "jpeg": WORSE,
        "blur": Expected("blind", _SMOOTH),
        "lost classes": Expected("blind", _ALONE),
        "duplicates": Expected("blind", _ALONE),
        "copies": _DISTANCE["copies"],
    },
    "is": {
        **dict.fromkeys(("noise", "blur", "jpeg"), WORSE),
        "lost classes": Expected("blind", "the classifier has a thousand classes, and those left fill as many of them"),
        "duplicates": Expected("blind", "the shares of the classes stay the same"),
        "copies": Expected("blind", "it sees no real images"),
    },
    "memorised": {**dict.fromkeys(("noise", "blur", "jpeg"), _SUSPECT), "copies": WORSE},
    "fdframes": {
        "noise": WORSE,
        "blur": WORSE,
        "order": Expected("blind", "frames are a set to it"),
        "frozen": WORSE,
    },
    "fdsteps": dict.fromkeys(("noise", "blur", "order", "frozen"), WORSE),
    "psnr": dict.fromkeys(("noise", "blur", "jpeg"), WORSE),
    "ssim": dict.fromkeys(("noise", "blur", "jpeg"), WORSE),
}
"""Kind of metric -> damage -> what it must say. Pairs that are not here are reported without a goal."""


def compare_sets(
    real: Memory, fake: tuple[Images, NDArray[np.int64]], extractor: str, cache: Path, table: Table, *, quick: bool
) -> None:
    """Sets of images, by everything that compares sets."""
    left_out = {"intrafd", "cas-resnet", *(["is", "cas"] if quick else [])}  # too few images of a class; minutes each
    kinds = [kind for kind in KINDS if kind not in left_out and kind not in CLIP_KINDS and not kind.startswith("ppl")]
    metrics = [f"{kind}_{extractor}" for kind in kinds]
    for kind, strength, damage, classes in damaged(*fake, real.images, real.labels):
        key = "undamaged" if np.array_equal(damage, fake[0]) else f"{kind}-{strength}"  # names kept features
        for record in compare_images(Memory(key, damage, classes), real, metrics, cache_dir=cache):
            note(table, record.metric, kind, strength, record.value)


def compare_clips(real: Images, fake: Images, cache: Path, table: Table) -> None:
    """Clips, by colours."""
    reference, whole = clips(real), clips(fake)
    labels = np.zeros(len(whole), dtype=np.int64)
    for kind, strength, damage in damaged_clips(whole):
        sets = Memory(f"clips-{kind}-{strength}", damage, labels), Memory("clips", reference, labels)
        for record in compare_images(*sets, ["fdframes_pixels", "fdsteps_pixels"], cache_dir=cache):
            note(table, record.metric, kind, strength, record.value)


def compare_reconstructions(images: Images, table: Table) -> None:
    """Images beside what became of them, pair by pair."""
    labels = np.zeros(len(images), dtype=np.int64)
    for kind, strength, damage, _ in damaged(images, labels, images, labels):
        if kind in ("noise", "blur", "jpeg") and strength:
            sides = [torch.from_numpy(side) for side in (damage, images)]
            for name, measure in (("psnr", psnr), ("ssim", ssim)):
                note(table, name, kind, strength, float(measure(*sides).mean()))


def note(table: Table, metric: str, kind: str, strength: float, value: float) -> None:
    """Keep a value in its place."""
    table.setdefault(metric, {}).setdefault(kind, []).append((strength, value))


def judge(metric: str, kind: str, values: list[float], expected: Expected | None) -> Ratio:
    """The share of steps at which a metric did not say what it has to; where it has no duty, did not say `worse`."""
    sign = -1 if metric in ("psnr", "ssim") or KINDS[parse_metric(metric).kind].higher_is_better else 1
    pairs = list(itertools.pairwise(values))
    match expected.verdict if expected is not None else "worse":
        case "better":
            steps = [sign * (b - a) <= 0 for a, b in pairs]
        case "blind":
            steps = [sign * (b - a) < 0.1 * abs(a) for a, b in pairs[:1]]
        case _:  # a share that is 0 cannot fall
            steps = [sign * (b - a) > 0 or (sign < 0 and a == b == 0) for a, b in pairs]
    name = f"{metric}/{kind.replace(' ', '-')}"
    return Ratio(name, steps.count(False) / len(steps), None if expected is None else 0.0)


def run() -> int:
    """Compute, print, write."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    count, extractor = (60, "pixels") if options.quick else (250, "efflite0")
    name, images, labels = real_images(2 * count)
    real, fake = Memory("reference", images[:count], labels[:count]), (images[count:], labels[count:])
    table: Table = {}
    with tempfile.TemporaryDirectory() as cache:
        compare_sets(real, fake, extractor, Path(cache), table, quick=options.quick)
        compare_clips(real.images, fake[0], Path(cache), table)
    compare_reconstructions(fake[0], table)
    found = []
    for metric, kinds in table.items():
        for kind, points in kinds.items():
            expected = None if options.quick else EXPECTED.get(metric.partition("_")[0], {}).get(kind)
            found.append(judge(metric, kind, [value for _, value in points], expected))
    raw = {"values": table, "images": name, "count": count, "expected": EXPECTED}
    return finish(found, raw, options)


if __name__ == "__main__":
    sys.exit(run())
