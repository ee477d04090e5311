"""Images for the benchmarks of evaluation: CIFAR-10's test images where they are, scikit-learn's digits elsewhere."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bessemer.evaluation.images import open_images

__all__ = ["as_jpeg", "real_images", "write_png"]


def real_images(count: int) -> tuple[str, NDArray[np.uint8], NDArray[np.int64]]:
    """Name of the set, `count` images [n, 3, 32, 32] in a fixed random order, and their classes.

    ``BESSEMER_CIFAR10`` names CIFAR-10 as a folder or an archive of class/name.jpg; where there are splits, that for
    training is taken.
    """
    place = os.environ.get("BESSEMER_CIFAR10")
    with open_images(place or "digits") as images:
        ids = np.random.default_rng(0).permutation(len(images))[:count]
        found = images.read(ids)
        labels = np.asarray(images.labels)[ids]
    if found.shape[-1] != 32:
        found = np.stack([np.asarray(Image.fromarray(i[0]).resize((32, 32)))[None] for i in found])
    return Path(place).name if place else "digits", np.repeat(found, 3 // found.shape[1], axis=1), labels


def write_png(folder: Path, images: NDArray[np.uint8]) -> None:
    """One file per image, named by its number."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:06d}.png")


def as_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """[C, H, W] after compression."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.uint8).transpose(2, 0, 1)
