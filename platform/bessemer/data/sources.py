"""Where images come from: a folder, an archive, or the word `digits`; and which class each belongs to.

The layout is ``class/name.jpg``, possibly below a common top folder or below splits (``train/class/name.jpg``);
images that lie in no class folder make up one class.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from bessemer.data.archives import Files, FolderFiles, open_archive
from bessemer.errors import DataError, MachineError

__all__ = ["ENDINGS", "SPLITS", "Entry", "Source", "open_source"]

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
"""Endings of the files that are taken for images."""
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
"""Top folders with these names are splits of one data set, not classes."""
DEFAULT_SPLITS = ("train", "training")


@dataclass(frozen=True, order=True)
class Entry:
    """One image of a source. Sorts by class, then key."""

    class_name: str
    key: str
    """Path below the class folder."""
    path: PurePosixPath
    """Path in the source."""


@dataclass
class Source:
    """Images with classes. `read` may be called from several threads."""

    name: str
    """As it was given."""
    files: Files
    entries: list[Entry]
    """Sorted."""
    split: str | None = None
    """Split that was taken."""
    splits: list[str] = field(default_factory=list)
    """Splits that there are."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files that are no images, by ending."""

    def read(self, entry: Entry) -> bytes:
        """The image file; ValueError when it is damaged."""
        return self.files.read(entry.path)


@contextmanager
def open_source(source: str | Path, *, spool_folder: Path, split: str | None = None) -> Iterator[Source]:
    """List the images of a source and keep it open for reading.

    Args:
        source: a folder, an archive (tar, also compressed with gzip, xz, zstd or bzip2; zip), or the word `digits`:
            scikit-learn's 1797 handwritten digits of 8x8 grey pixels.
        spool_folder: where a compressed tar is decompressed to; freed at the end.
        split: which split to take where the source has splits; `all` takes all of them. By default the training
            split.

    Raises:
        DataError: no such source, an unknown type, a damaged archive, no images, or no such split.
    """
    files = _open_files(source, spool_folder)
    try:
        yield _arrange(str(source), files, split)
    finally:
        files.close()


def _open_files(source: str | Path, spool_folder: Path) -> Files:
    if str(source) == "digits":
        return _Digits()
    path = Path(source)
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise DataError(
            f"{source} does not exist; a source is an image folder, an archive, or the word digits (built in)"
        )
    return open_archive(path, spool_folder)


def _arrange(name: str, files: Files, split: str | None) -> Source:
    ignored: Counter[str] = Counter()
    images: list[PurePosixPath] = []
    for path in files.paths:
        if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            ignored["hidden"] += 1
        elif path.suffix.lower() in ENDINGS:
            images.append(path)
        else:
            ignored[path.suffix.lower() or "no ending"] += 1
    if files.links:
        ignored["links"] += files.links
    if not images:
        found = ", ".join(f"{count} {ending}" for ending, count in ignored.most_common(5)) or "nothing"
        raise DataError(
            f"{name} holds no images: files ending in {', '.join(sorted(ENDINGS))} were looked for, {found} found; put "
            f"images in as class/name.jpg, or flat for a data set without classes"
        )
    relative = {path: path.parts for path in images}
    relative, taken, splits = _take_split(name, relative, split)
    source = Source(name, files, _classify(name, relative), taken, splits, dict(sorted(ignored.items())))
    source.entries.sort()
    return source


Parts = dict[PurePosixPath, tuple[str, ...]]


def _take_split(name: str, relative: Parts, split: str | None) -> tuple[Parts, str | None, list[str]]:
    """Strip common top folders and choose the split."""
    while True:
        tops = sorted({parts[0] for parts in relative.values()})
        shallow = min(len(parts) for parts in relative.values())
        if shallow >= 2 and SPLITS.issuperset(top.lower() for top in tops):
            break
        if len(tops) == 1 and shallow >= 3:
            relative = {path: parts[1:] for path, parts in relative.items()}
            continue
        if split is not None:
            raise DataError(
                f"--split {split}: {name} has no splits; its top folders are {_some(tops)}, splits are named "
                f"{', '.join(sorted(SPLITS))}. Leave --split out to take all images"
            )
        return relative, None, []
    if split is None:
        default = [top for top in tops if top.lower() in DEFAULT_SPLITS]
        if len(tops) > 1 and len(default) != 1:
            raise DataError(f"{name} has the splits {', '.join(tops)}; choose: --split {tops[0]}, or --split all")
        split = default[0] if default else tops[0]
    if split == "all":
        # The split stays in the key, so that equal names in two splits remain two images.
        return {path: (*parts[1:-1], f"{parts[0]}-{parts[-1]}") for path, parts in relative.items()}, "all", tops
    if split not in tops:
        raise DataError(f"--split {split}: {name} has the splits {', '.join(tops)}; choose one of them, or all")
    return {path: parts[1:] for path, parts in relative.items() if parts[0] == split}, split, tops


def _classify(name: str, relative: Parts) -> list[Entry]:
    for path in relative:
        if not str(path).isprintable():  # also what is no UTF-8
            raise DataError(f"{name}: the file name {str(path)!r} has characters that cannot be shown; rename the file")
    flat = [path for path, parts in relative.items() if len(parts) == 1]
    if flat and len(flat) < len(relative):
        folders = sorted({parts[0] for parts in relative.values() if len(parts) > 1})
        raise DataError(
            f"{name} has {len(flat)} images beside its class folders ({_some([str(path) for path in sorted(flat)])}; "
            f"folders {_some(folders)}); move them into class folders, or all images into one"
        )
    if flat:
        return [Entry("all", parts[0], path) for path, parts in relative.items()]
    return [Entry(parts[0], "/".join(parts[1:]), path) for path, parts in relative.items()]


class _Digits:
    """scikit-learn's digits as PNG files in memory: ``3/0013.png``."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MachineError(
                "the data set digits comes with scikit-learn, which is not installed: pip install 'bessemer[digits]'"
            ) from None
        digits: Any = load_digits()
        # 0..16 are the counts of set pixels in 4x4 blocks of the scan.
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self._rows = {PurePosixPath(f"{label}/{row:04d}.png"): row for row, label in enumerate(digits.target.tolist())}
        self.paths = list(self._rows)
        self.links = 0

    def read(self, path: PurePosixPath) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self._images[self._rows[path]]).save(file, "PNG")
        return file.getvalue()

    def close(self) -> None:
        pass


def _some(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
