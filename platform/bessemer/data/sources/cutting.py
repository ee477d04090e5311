"""From clips and recordings of a source to samples of equal length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TypeVar

from bessemer.data.sources.archives import Files
from bessemer.data.sources.arrays import ArrayFiles
from bessemer.data.sources.clips import ANIMATED, count_frames
from bessemer.data.sources.pieces import common_length, some
from bessemer.data.sources.sound import Recording, describe_recording
from bessemer.data.sources.source import Entry, Source
from bessemer.errors import DataError

__all__ = ["cut"]

T = TypeVar("T")


def cut(source: Source, length: int | None = None) -> None:
    """Cut the clips or recordings of a source into samples of one length, and note it there; images stay as they are.

    Pieces follow each other without overlap, so that an epoch holds each frame once and a sample is the same bytes in
    every epoch. The rest at the end of each is left out, as are those that are too short; `ignored` counts the latter.

    Args:
        source: to change.
        length: frames, or samples of sound; None: all must have one length.

    Raises:
        DataError: lengths or rates differ, or files are damaged; names them and the fix.
    """
    if length is not None and source.kind not in ("clips", "audio"):
        raise DataError(f"--length {length} cuts clips and sound, and {source.name} is of {source.kind}; leave it out")
    if source.kind not in ("clips", "audio", "bits"):
        return
    if source.kind == "bits":
        lengths = {entry.path: _array(source.files, entry.path)[0] for entry in source.entries}
        source.count = common_length(source.name, "bits", lengths, None)
    elif source.kind == "clips":
        lengths = _describe(source, lambda files, entry: _frames(files, entry))
        source.count = common_length(source.name, "frames", lengths, length)
    else:
        recordings = _describe(source, lambda files, entry: describe_recording(files, entry.path))
        source.rate = _common_rate(source, recordings)
        lengths = {path: one.samples for path, one in recordings.items()}
        source.count = common_length(source.name, "samples", lengths, length)
    count = source.count
    short = sum(lengths[entry.path] < count for entry in source.entries)
    if short:
        source.ignored[f"shorter than {count}"] = short
    source.entries = [
        piece for entry in source.entries for piece in _pieces(source, entry, lengths[entry.path] // count, count)
    ]


def _pieces(source: Source, entry: Entry, pieces: int, count: int) -> list[Entry]:
    if source.kind == "clips" and not _is_one_file(source.files, entry):
        return [replace(entry, paths=entry.paths[p * count : (p + 1) * count]) for p in range(pieces)]
    return [replace(entry, piece=piece) for piece in range(pieces)]


def _is_one_file(files: Files, entry: Entry) -> bool:
    """Whether one file holds all frames of a clip."""
    return len(entry.paths) == 1 and (isinstance(files, ArrayFiles) or entry.path.suffix.lower() in ANIMATED)


def _frames(files: Files, entry: Entry) -> int:
    if not _is_one_file(files, entry):
        return len(entry.paths)
    return _array(files, entry.path)[0] if isinstance(files, ArrayFiles) else count_frames(files, entry.path)


def _array(files: Files, path: PurePosixPath) -> tuple[int, ...]:
    if not isinstance(files, ArrayFiles):
        raise DataError(f"{path} is no array; bits come as NumPy arrays [N, ...] of 0 and 1: .npy, or .npz with labels")
    return files.shape(path)


def _describe(source: Source, describe: Callable[[Files, Entry], T]) -> dict[PurePosixPath, T]:
    """What each file is; all that cannot be read are named at once."""
    found: dict[PurePosixPath, T] = {}
    faults: list[str] = []
    for entry in source.entries:
        try:
            found[entry.path] = describe(source.files, entry)
        except ValueError as error:
            faults.append(f"{entry.path}: {error}")
    if faults:
        listed = "\n".join(f"- {fault}" for fault in faults[:5])
        more = f"\n... and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{source.name}: {len(faults)} of {len(source.entries)} files cannot be used:\n{listed}{more}\n"
            f"Remove them, or put undamaged ones in their place."
        )
    return found


def _common_rate(source: Source, recordings: dict[PurePosixPath, Recording]) -> int:
    rates: dict[int, list[PurePosixPath]] = {}
    for path, one in recordings.items():
        rates.setdefault(one.rate, []).append(path)
    if len(rates) > 1:
        shown = "; ".join(f"{rate} Hz: {len(paths)} ({some(paths, 2)})" for rate, paths in sorted(rates.items()))
        most = max(rates, key=lambda rate: len(rates[rate]))
        raise DataError(
            f"{source.name}: sample rates differ: {shown}. All sound of a data set has one rate: resample the others, "
            f"such as ffmpeg -i FILE -ar {most} OUT.wav"
        )
    return next(iter(rates))
