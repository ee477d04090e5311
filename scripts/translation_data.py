#!/usr/bin/env python
"""Write small real data for the translation jobs from an archive of class folders, such as CIFAR-10 as JPEG files.

`colour` writes pairs: the input is an image in grey, the target the image itself. `tint` writes two domains: images
under a cold light, and other images of the same class under a warm one, which nothing pairs.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

from PIL import Image

TRAIN, TEST = 500, 100  # images of each class for pairs
LIGHT = {"A": (0.55, 0.85, 1.15), "B": (1.15, 0.85, 0.5)}  # of red, green and blue
TINTED = "horse"


def images(archive: Path) -> dict[tuple[str, str], list[bytes]]:
    """(Split, class) -> files, in the order of their names."""
    found: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and len(parts) >= 3:
                file = tar.extractfile(member)
                assert file is not None
                found[parts[-3], parts[-2]].append((parts[-1], file.read()))
    return {key: [data for _, data in sorted(files)] for key, files in found.items()}


def save(path: Path, image: Image.Image) -> None:
    """Write an image as PNG; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def colour(found: dict[tuple[str, str], list[bytes]], out: Path) -> None:
    """Pairs of grey and colour, of all classes."""
    for (split, name), files in found.items():
        for number, data in enumerate(files[: TRAIN if split == "train" else TEST]):
            image = Image.open(io.BytesIO(data))
            file = f"{name}-{number:04d}.png"
            save(out / split / "input" / file, image.convert("L"))
            save(out / split / "target" / file, image.convert("RGB"))


def tint(found: dict[tuple[str, str], list[bytes]], out: Path) -> None:
    """Two domains: the first half of a class in one light, the second half in the other."""
    for split in ("train", "test"):
        files = found[split, TINTED]
        half = len(files) // 2
        for domain, part in (("A", files[:half]), ("B", files[half:])):
            for number, data in enumerate(part):
                bands = Image.open(io.BytesIO(data)).convert("RGB").split()
                lit = [
                    band.point(lambda v, f=f: min(round(v * f), 255))
                    for band, f in zip(bands, LIGHT[domain], strict=True)
                ]
                save(out / f"{split}{domain}" / f"{number:04d}.png", Image.merge("RGB", lit))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("colour", "tint"))
    parser.add_argument("archive", type=Path, help="tar of SPLIT/CLASS/FILE")
    parser.add_argument("out", type=Path, help="folder to make")
    options = parser.parse_args()
    {"colour": colour, "tint": tint}[options.what](images(options.archive), options.out)
