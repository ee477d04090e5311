"""Where images come from, and which class each belongs to.

Folders and archives hold images as ``class/name.jpg``, possibly below a common top folder or below splits
(``train/class/name.jpg``); images that lie in no class folder make up one class. They may also hold NumPy arrays,
CIFAR's or MNIST's files, Parquet files or WebDataset shards, which are told by their names.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bessemer.data.fields import KINDS, NOUNS, Kind
from bessemer.data.sources import arrays, classics
from bessemer.data.sources.archives import Files, FolderFiles, open_archive, open_tars
from bessemer.data.sources.arrays import ArrayFiles, Labelled
from bessemer.data.sources.clips import ANIMATED, are_animated, frames_in_folders
from bessemer.data.sources.labels import class_order, match_labels, parse_labels
from bessemer.data.sources.pairs import Parts, are_domains, are_pairs, pair, without_domain_words
from bessemer.data.sources.parquet import open_parquet
from bessemer.data.sources.sound import SOUND
from bessemer.data.sources.splits import take_split
from bessemer.errors import DataError, MachineError, some

__all__ = ["ENDINGS", "Entry", "Source", "open_source"]

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
"""Endings of the files that are taken for images."""

_ENDINGS: dict[Kind, frozenset[str]] = {
    **dict.fromkeys(KINDS, ENDINGS),
    "clips": ENDINGS | ANIMATED,
    "audio": SOUND,
}
"""Kind -> endings of the files that are taken for samples, or for parts of them."""


@dataclass(frozen=True, order=True)
class Entry:
    """One sample of a source. Sorts by class, then key."""

    class_name: str
    key: str
    """Path below the class folder."""
    paths: tuple[PurePosixPath, ...]
    """Its files in the source: one, or both images of a pair, or the frames of a clip."""
    piece: int | None = None
    """Number of the piece, where a file holds a whole clip or recording."""

    @property
    def path(self) -> PurePosixPath:
        """Its first file."""
        return self.paths[0]


@dataclass
class Source:
    """Images with classes. `files.read` may be called from several threads."""

    name: str
    """As it was given."""
    files: Files
    entries: list[Entry]
    """Sorted."""
    classes: list[str]
    """In the order of their labels."""
    labels: str
    """Where the classes come from: `folders`, `none`, `source` for what holds them beside the images, or a file."""
    split: str | None = None
    """Split that was taken."""
    splits: list[str] = field(default_factory=list)
    """Splits that there are."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files that are no images, by ending."""
    kind: Kind = "images"
    """What a sample is."""
    count: int | None = None
    """Frames of a clip, samples of a piece of sound, or bits of a vector."""
    rate: int | None = None
    """Samples of sound per second."""


@dataclass
class _Found:
    """What a source holds, before splits and classes are told apart."""

    files: Files
    labels: dict[PurePosixPath, str] | None = None
    """Class of each image, where the source says it by other means than folders."""
    order: list[str] | None = None
    """All classes in the order of their labels, where the source says it."""
    kind: Kind = "images"
    """What a sample is."""


@contextmanager
def open_source(
    source: str | Path,
    *,
    spool_folder: Path,
    split: str | None = None,
    labels: str | Path | None = None,
    kind: Kind | None = None,
) -> Iterator[Source]:
    """List the images of a source and keep it open for reading.

    Args:
        source: a folder; an archive (tar, also compressed with gzip, xz, zstd or bzip2; zip); an npy, npz or Parquet
            file; or the word `digits`: scikit-learn's 1797 handwritten digits of 8x8 grey pixels.
        spool_folder: where what gives no random access is copied to, such as compressed tars.
        split: which split to take where the source has splits; `all` takes all of them. By default the training
            split.
        labels: `folders`, `none`, or a json or csv file, see :func:`bessemer.data.sources.labels.parse_labels`. By
            default what the source has: a ``dataset.json``, labels beside the images, or folders.
        kind: what a sample is; by default what the names in the source say.

    Raises:
        DataError: no such source, an unknown type, a damaged archive, no images, or no such split.
    """
    found = _open(source, spool_folder, kind)
    try:
        yield _arrange(str(source), found, split, None if labels is None else str(labels))
    finally:
        found.files.close()


def _open(source: str | Path, spool_folder: Path, kind: Kind | None) -> _Found:
    name = str(source)
    if name == "digits":
        return _spooled(spool_folder, "digits", [_digits()], name)
    path = Path(source)
    if path.is_dir():
        return _recognise(name, FolderFiles.below(path), spool_folder, kind)
    if not path.exists():
        raise DataError(
            f"{source} does not exist; a source is a folder or archive of images, an npz or Parquet file, or the word "
            f"digits (built in)"
        )
    inside = PurePosixPath(path.name)
    if arrays.is_numpy(inside) or inside.suffix.lower() == ".parquet":
        return _recognise(name, FolderFiles(path.absolute().parent, [inside]), spool_folder, kind)
    return _recognise(name, open_archive(path, spool_folder), spool_folder, kind)


def _recognise(name: str, files: Files, spool_folder: Path, kind: Kind | None) -> _Found:
    """Look into files that are no images themselves: arrays, tables, shards."""
    found = _look_into(name, files, spool_folder, kind)
    found.kind = kind or _kind([path for path in found.files.paths if not _hidden(path)])
    return found


def _look_into(name: str, files: Files, spool_folder: Path, kind: Kind | None) -> _Found:
    seen = [path for path in files.paths if not _hidden(path)]
    endings = _ENDINGS[kind or _kind(seen)]
    if any(path.suffix.lower() in endings for path in seen):
        return _Found(files, _labels_of_shards(name, files, seen, endings))
    classics.refuse_pickles(name, seen)
    tables = [path for path in seen if path.suffix.lower() == ".parquet"]
    if tables:
        spool = _spool_name(spool_folder, name, ".bin")
        return _Found(*open_parquet(name, files, tables, spool))
    shards = [path for path in seen if path.suffix.lower() == ".tar"]
    if shards and isinstance(files, FolderFiles):
        inner = open_tars([(path.as_posix(), files.folder / path) for path in sorted(shards)])
        labels = _labels_of_shards(name, inner, inner.paths, _ENDINGS[kind or _kind(inner.paths)])
        return _Found(inner, labels or dict.fromkeys(inner.paths, "all"))
    for is_kind, read in ((classics.is_idx, classics.idx), (classics.is_cifar, classics.cifar)):
        if any(map(is_kind, seen)):
            return _spooled(spool_folder, name, read(files), files.part(seen).stamp())
    numpy_files = sorted(filter(arrays.is_numpy, seen))
    if numpy_files:
        return _spooled(
            spool_folder, name, _numpy(name, files, numpy_files, kind or "images"), files.part(seen).stamp()
        )
    return _Found(files)


def _spooled(spool_folder: Path, name: str, found: Any, stamp: str) -> _Found:
    files, labels = ArrayFiles.spool(found, _spool_name(spool_folder, name, ".raw"), stamp)
    return _Found(files, labels)


def _spool_name(spool_folder: Path, name: str, ending: str) -> Path:
    return spool_folder / f"spool-{hashlib.sha256(name.encode()).hexdigest()[:16]}{ending}"


def _numpy(name: str, files: Files, paths: list[PurePosixPath], kind: Kind) -> Iterator[Labelled]:
    label_files = [path for path in paths if path.suffix.lower() == ".npy" and path.stem.lower() in arrays.LABELS]
    image_files = [path for path in paths if path not in label_files]
    if label_files and len(image_files) != 1:
        raise DataError(
            f"{name} has the labels {label_files[0]} and {len(image_files)} files of images; put both into one npz: "
            f"numpy.savez(file, images=..., labels=...)"
        )
    for path in image_files:
        with ExitStack() as opened:
            stream = opened.enter_context(_stream(files, path))
            beside = opened.enter_context(_stream(files, label_files[0])) if label_files else None
            for array in arrays.numpy_arrays(str(path), stream, beside, kind):
                if len(image_files) > 1:
                    array.split = f"{array.split}/{path.stem}" if array.split else path.stem
                yield array


def _stream(files: Files, path: PurePosixPath) -> IO[bytes]:
    try:
        if isinstance(files, FolderFiles):
            return (files.folder / path).open("rb")
        data = files.read(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    assert isinstance(data, bytes)
    return io.BytesIO(data)


def _labels_of_shards(
    name: str, files: Files, seen: list[PurePosixPath], endings: frozenset[str]
) -> dict[PurePosixPath, str] | None:
    """Labels of a WebDataset, where a sample's label is the file ``<key>.cls`` beside its image."""
    labels = {_key(path): path for path in seen if path.suffix.lower() == ".cls"}
    if not labels:
        return None
    found = {}
    for path in seen:
        if path.suffix.lower() not in endings:
            continue
        key = _key(path)
        if key not in labels:
            raise DataError(f"{name}: {path} has no label beside it ({key}.cls), as other images have; add it")
        try:
            text = bytes(files.read(labels[key])).decode("ascii").strip()
            found[path] = str(int(text))
        except ValueError as error:
            raise DataError(f"{name}: the label {labels[key]} is no integer ({error}); correct it") from None
    return found


def _key(path: PurePosixPath) -> PurePosixPath:
    """What the members of a sample have in common: all before the first dot of the name, as webdataset has it."""
    return path.with_name(path.name[: path.name.index(".", 1)])


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _arrange(name: str, found: _Found, split: str | None, labels: str | None) -> Source:
    files, kind = found.files, found.kind
    ignored: Counter[str] = Counter()
    images: list[PurePosixPath] = []
    endings = _ENDINGS[kind]
    for path in files.paths:
        if _hidden(path):
            ignored["hidden"] += 1
        elif path.suffix.lower() in endings:
            images.append(path)
        elif found.labels is None or path.suffix.lower() != ".cls":
            ignored[path.suffix.lower() or "no ending"] += 1
    if files.links:
        ignored["links"] += files.links
    if not images:
        listed = ", ".join(f"{count} {ending}" for ending, count in ignored.most_common(5)) or "nothing"
        raise DataError(
            f"{name} holds no {NOUNS[kind]}: files ending in {', '.join(sorted(endings))} were looked for, "
            f"{listed} found; put them in as class/name.jpg, or flat for a data set without classes"
        )
    others: dict[PurePosixPath, list[PurePosixPath]] = {}
    relative = {path: path.parts for path in images}
    if kind == "pairs":
        relative, others = pair(name, images)
    elif kind == "domains":
        relative = without_domain_words(relative)
    elif kind == "clips" and not isinstance(files, ArrayFiles) and not are_animated(files, images):
        relative, others = frames_in_folders(name, images)
    relative, taken, splits = take_split(name, relative, split)
    known, order, origin = _labels(found, list(relative), labels)
    entries = [
        replace(entry, paths=tuple(others[entry.path])) if entry.path in others else entry
        for entry in _classify(name, relative, known)
    ]
    present = {entry.class_name for entry in entries}
    classes = [one for one in order if one in present] if order else class_order(present)
    if kind == "domains" and len(classes) != 2:
        raise DataError(
            f"{name} has {len(classes)} class folders ({some(classes)}); two domains are two folders of images, such "
            f"as horse and zebra, or trainA and trainB"
        )
    return Source(name, files, sorted(entries), classes, origin, taken, splits, dict(sorted(ignored.items())), kind)


def _kind(paths: list[PurePosixPath]) -> Kind:
    """What the names of the files say that samples are."""
    endings = {path.suffix.lower() for path in paths}
    if not endings & ENDINGS:
        return "clips" if ".gif" in endings else "audio" if endings & SOUND else "images"
    images = [path for path in paths if path.suffix.lower() in ENDINGS]
    return "pairs" if are_pairs(images) else "domains" if are_domains(images) else "images"


def _labels(
    found: _Found, images: list[PurePosixPath], wanted: str | None
) -> tuple[dict[PurePosixPath, str] | None, list[str] | None, str]:
    """Class of each image, the order of the classes, and where both come from."""
    if wanted == "none":
        return dict.fromkeys(images, "all"), None, "none"
    if wanted == "folders":
        return None, None, "folders"
    if wanted is not None:
        path = Path(wanted)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"--labels {wanted}: cannot be read: {error.strerror}; name a json or csv file, folders, or none"
            ) from None
        parsed = parse_labels(wanted, data)
        inner = PurePosixPath()
    elif found.labels is not None:
        return found.labels, found.order, "source"
    else:
        beside = [path for path in found.files.paths if path.name == "dataset.json" and not _hidden(path)]
        if len(beside) != 1:
            return None, None, "folders"
        try:
            data = bytes(found.files.read(beside[0]))
        except ValueError as error:
            raise DataError(f"{beside[0]}: {error}") from None
        wanted, inner = str(beside[0]), beside[0].parent
        parsed = parse_labels(wanted, data)
    if parsed is None:
        return dict.fromkeys(images, "all"), None, "none"
    return match_labels(wanted, parsed, inner, images), None, PurePosixPath(wanted).name


def _classify(name: str, relative: Parts, labels: dict[PurePosixPath, str] | None) -> list[Entry]:
    for path in relative:
        if not str(path).isprintable():  # also what is no UTF-8
            raise DataError(f"{name}: the file name {str(path)!r} has characters that cannot be shown; rename the file")
    if labels is not None:
        return [Entry(labels[path], "/".join(parts), (path,)) for path, parts in relative.items()]
    flat = [path for path, parts in relative.items() if len(parts) == 1]
    if flat and len(flat) < len(relative):
        folders = sorted({parts[0] for parts in relative.values() if len(parts) > 1})
        raise DataError(
            f"{name} has {len(flat)} images beside its class folders ({some(sorted(flat))}; "
            f"folders {some(folders)}); move them into class folders, or all images into one, "
            f"or give their labels in a file: --labels"
        )
    if flat:
        return [Entry("all", parts[0], (path,)) for path, parts in relative.items()]
    return [Entry(parts[0], "/".join(parts[1:]), (path,)) for path, parts in relative.items()]


def _digits() -> Labelled:
    """scikit-learn's digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MachineError(
            "the data set digits comes with scikit-learn, which is not installed: pip install 'bessemer[digits]'"
        ) from None
    digits: Any = load_digits()
    # 0..16 are the counts of set pixels in 4x4 blocks of the scan.
    images: NDArray[np.uint8] = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Labelled(None, iter([images[..., None]]), [str(label) for label in digits.target.tolist()])
