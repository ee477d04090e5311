"""From what belongs to a sample in the source to the files that a shard stores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bessemer.data.fields import KINDS, FieldName, bits_file, wave_file
from bessemer.data.packing.prepare import Prepared, Rules, prepare
from bessemer.data.sources.archives import Files
from bessemer.data.sources.clips import clip_frames
from bessemer.data.sources.sound import sound_piece
from bessemer.data.sources.source import Entry

__all__ = ["StoredFile", "prepare_sample"]


@dataclass(frozen=True)
class StoredFile:
    """A file of a sample."""

    field: FieldName
    name: str
    """What follows the sample's number: `jpg`, `targets.png`, `0003.jpg`."""
    content: Prepared


def prepare_sample(files: Files, entry: Entry, rules: Rules) -> list[StoredFile]:
    """Read, check and fit what belongs to one sample.

    Raises:
        ValueError: something of it is damaged or cannot be fitted; the message says what and why.
    """
    fields = KINDS[rules.kind]
    if rules.kind == "pairs":
        return [_named(field, field, _picture(files, entry, side, rules)) for side, field in enumerate(fields)]
    count = rules.count or 0
    first = (entry.piece or 0) * count
    if rules.kind == "clips":
        if entry.piece is None:
            frames = [_picture(files, entry, number, rules) for number in range(len(entry.paths))]
        else:
            frames = [prepare(pixels, rules) for pixels in clip_frames(files, entry.path, first, count)]
        return [_named("clips", f"{number:04d}", frame) for number, frame in enumerate(frames)]
    if rules.kind == "audio":
        data = wave_file(sound_piece(files, entry.path, first, count), rules.rate or 0)
        return [StoredFile("audio", "wav", Prepared(data, "wav", 0, 0, "", passed_through=False))]
    if rules.kind == "bits":
        data = bits_file(np.asarray(files.read(entry.path)))
        return [StoredFile("bits", "npy", Prepared(data, "npy", 0, 0, "", passed_through=False))]
    content = prepare(files.read(entry.path), rules)
    return [StoredFile(fields[0], content.ending, content)]


def _named(field: FieldName, name: str, content: Prepared) -> StoredFile:
    return StoredFile(field, f"{name}.{content.ending}", content)


def _picture(files: Files, entry: Entry, number: int, rules: Rules) -> Prepared:
    """One of the pictures of a sample."""
    path = entry.paths[number]
    try:
        return prepare(files.read(path), rules)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
