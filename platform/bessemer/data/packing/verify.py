"""Proving a copy of a data set: sizes and hashes of its files; deep, every header, byte and image of its shards."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bessemer.data.index import Index
from bessemer.data.manifest import Manifest
from bessemer.data.packing.foreign import CLS, Sample, read_samples
from bessemer.data.reading.dataset import read_index
from bessemer.data.sources.tars import Member
from bessemer.errors import DataError
from bessemer.files import file_sha256

__all__ = ["Fault", "verify"]


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was packed."""

    file: str
    """Name in the data set."""
    problem: str


def verify(
    directory: Path, *, deep: bool = False, progress: Callable[[int, int | None], None] | None = None
) -> list[Fault]:
    """What of a data set is not as its manifest says; empty where all is well.

    Args:
        directory: of the data set.
        deep: also walk the headers of the shards, hold the crc32 and the label of every sample against the index, and
            decode every image. Where a shard's hash differs, this says which samples are affected.
        progress: called with (shards done, shards in all).

    Raises:
        DataError: there is no manifest, or it is damaged itself.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    faults: list[Fault] = []
    index: Index | None = None  # a damaged index must not put the blame on the shards
    try:
        index = read_index(directory, manifest)
    except DataError as error:
        faults.append(Fault(manifest.index.name, str(error)))
    first = 0
    for number, shard in enumerate(manifest.shards, start=1):
        path = directory / shard.name
        found = list(_verify_file(path, shard.bytes, shard.sha256))
        if deep and index is not None and path.is_file():
            found += _verify_samples(path, index[first : first + shard.samples], first, manifest)
        faults += [Fault(shard.name, problem) for problem in found]
        first += shard.samples
        if progress:
            progress(number, len(manifest.shards))
    for path in sorted(directory.glob("*.tar")):
        if path.name not in manifest.files:
            faults.append(Fault(path.name, "it is not in the manifest; remove it, or index the shards anew"))
    return faults


def _verify_file(path: Path, size: int, sha256: str) -> Iterator[str]:
    try:
        found = path.stat().st_size
        if found != size:
            yield f"it has {found} bytes instead of {size}"
        elif file_sha256(path) != sha256:
            yield "its content differs from the manifest (sha256)"
    except FileNotFoundError:
        yield "it is missing"
    except OSError as error:
        yield f"it cannot be read: {error.strerror}"


def _verify_samples(path: Path, index: Index, first: int, manifest: Manifest) -> Iterator[str]:
    """Hold a shard against its part of the index, which says what must lie where even if a header is damaged."""
    samples: dict[int, tuple[Sample, Member]] = {}  # by the place of each file
    fields = manifest.sample_fields
    try:
        for sample in read_samples(path, None if manifest.kind in ("images", "domains") else manifest.members):
            samples |= {member.offset: (sample, member) for member in sample.files}
    except DataError as error:
        yield str(error)
    else:
        for offset in sorted(samples.keys() - set(index["offset"].flat)):
            yield f"sample {samples[offset][0].key!r} at byte {offset} is not in the index"
    owners = [field for field in fields for _ in range(field.members)]
    pieces = [np.empty(f.stored_shape[1:] if f.members > 1 else f.stored_shape, f.stored_dtype) for f in owners]
    with path.open("rb") as file:
        for number, row in enumerate(index, start=first):
            for (offset, length, _, crc32), field, out in zip(row.tolist(), owners, pieces, strict=True):
                where = f"sample {number:08d} at byte {offset}"
                file.seek(offset)
                data = file.read(length)
                if len(data) != length:
                    yield f"{where} is cut off: the file ends {length - len(data)} bytes too early"
                elif zlib.crc32(data) != crc32:
                    yield f"{where}: its bytes changed since it was packed (crc32)"
                else:
                    try:
                        field.decode(data, out)
                    except ValueError as error:
                        yield f"{where} does not decode: {error}"
                entry = samples.get(offset)
                if entry is not None and entry[1].size != length:
                    yield f"{where} has {entry[1].size} bytes by its header, {length} by the index"
            if entry is not None and (member := entry[0].label) is not None:
                file.seek(member.offset)
                text = file.read(member.size).strip()
                label = int(row["label"][0])
                expected = manifest.classes[label] if manifest.packing.labels == CLS else str(label)
                if text.decode("ascii", "replace") != expected:
                    yield f"{where} has the label {text!r}, the index says {expected}"
