"""Indexing WebDataset shards that others wrote: every member accounted for, every image decoded once."""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bessemer.data.index import INDEX_DTYPE, Index, index_bytes
from bessemer.data.manifest import MANIFEST, FileRecord, Manifest, Packing, ShardRecord, data_hash
from bessemer.data.packing.findings import Findings, declare
from bessemer.data.packing.parallel import run_in_processes
from bessemer.data.packing.prepare import Rules, prepare
from bessemer.data.sources.labels import class_order
from bessemer.data.sources.source import ENDINGS
from bessemer.data.sources.tars import Member, read_members
from bessemer.errors import DataError
from bessemer.files import write_atomically

__all__ = ["CLS", "Sample", "index_shards", "read_samples"]

CLS = ".cls"
"""`packing.labels` of an indexed data set: its ``.cls`` members hold the classes' names, not their numbers."""
_INDEX = "index.npy"
_AS_THEY_ARE = Rules(size=None, resize="none", mode=None)
_MOST_FAULTS = 20


@dataclass(frozen=True)
class Sample:
    """The members of a sample: image, label where there is one, and the endings of the rest."""

    key: str
    files: tuple[Member, ...]
    """The image; or all files but the label, of data sets that have no image in each sample."""
    label: Member | None
    others: list[str]

    @property
    def image(self) -> Member:
        """The first of its files."""
        return self.files[0]


def read_samples(path: Path, members: int | None = None) -> Iterator[Sample]:
    """The samples of a shard, in order.

    A sample is a run of files whose names agree up to the first dot, as `webdataset` has it; one of them is an image.

    Args:
        path: of the shard.
        members: files that a sample has beside its label; None for one image, beside which other files may be.

    Raises:
        DataError: the tar is damaged, see :func:`bessemer.data.sources.tars.read_members`; or a sample has no image,
            two of them, the same ending twice, or lies apart; or there is a link.
    """
    seen: set[str] = set()
    listed = (member for member in read_members(path) if member.kind != "folder")
    for key, group in groupby(listed, _key):
        found = list(group)
        where = f"{path}: sample {key!r} at byte {found[0].offset}"
        if any(member.kind == "other" for member in found):
            raise DataError(f"{where} is a link or no regular file; write the shard anew with the file itself")
        if key in seen:
            raise DataError(f"{where} has members before it that belong to it; the files of a sample lie together")
        seen.add(key)
        named = [(_ending(member), member) for member in found]
        endings = [ending for ending, _ in named]
        if len(set(endings)) != len(endings):
            raise DataError(f"{where} has two files with the same ending ({', '.join(endings)}); keep one")
        labels = [member for ending, member in named if ending == CLS]
        if members is None:
            files = [member for ending, member in named if ending in ENDINGS]
        else:
            files = [member for ending, member in named if ending != CLS]
        if len(files) != (members or 1):
            what = "images" if members is None else "files"
            rule = "one" if members is None else str(members)
            raise DataError(f"{where} has {len(files)} {what} ({', '.join(endings)}); a sample has {rule}")
        others = [ending for ending, member in named if member not in files and ending != CLS]
        yield Sample(key, tuple(files), labels[0] if labels else None, others)


def index_shards(
    directory: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Make a data set of a directory of shards: write ``index.npy`` and ``manifest.json`` beside them.

    The shards stay as they are. Their images must be JPEG or PNG, square, of one size and colour mode.

    Args:
        directory: with ``*.tar``.
        workers: processes.
        overwrite: replace an index and a manifest that are there.
        progress: called with (shards done, shards in all).

    Raises:
        DataError: names the shards and samples that are damaged or do not fit, the rule, and the fix.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is no directory; name the one that holds the shards, *.tar")
    if (directory / MANIFEST).exists() and not overwrite:
        raise DataError(
            f"{directory} has a manifest already; check it with `bessemer data verify {directory}`, or index anew with "
            f"--overwrite"
        )
    shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise DataError(f"{directory} has no shards: *.tar (not compressed) were looked for")
    found: dict[str, _Found] = {}
    results = map(_read_shard, shards) if workers == 1 else run_in_processes(_read_shard, shards, workers)
    for result in results:
        found[result.name] = result
        if progress:
            progress(len(found), len(shards))
    manifest, index = _assemble(directory, [found[shard.name] for shard in shards])
    write_atomically(directory / _INDEX, lambda file: file.write(index))
    manifest.save(directory)
    return manifest


@dataclass
class _Found:
    """What one shard holds."""

    name: str
    faults: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    record: ShardRecord | None = None
    index: Index = field(default_factory=lambda: np.empty(0, dtype=INDEX_DTYPE))
    """Labels are numbers of `classes` of this shard."""
    classes: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def _read_shard(path: Path) -> _Found:
    found = _Found(path.name)
    try:
        samples = list(read_samples(path))
        if not samples:
            raise DataError(f"{path} has no samples; remove it")
    except DataError as error:
        found.faults.append(str(error))
        return found
    labels: dict[str, int] = {}
    records = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for sample in samples:
            data = content[sample.image.offset : sample.image.offset + sample.image.size]
            try:
                prepared = prepare(data, _AS_THEY_ARE)
                if prepared.mode in ("RGB", "L") and not prepared.passed_through:
                    raise ValueError("only JPEG and PNG, not rotated by a note of the camera, can be read as they are")
                label = _label(sample, content)
            except ValueError as error:
                found.faults.append(f"{path}: sample {sample.key!r} at byte {sample.image.offset}: {error}")
                continue
            found.findings.see(f"{path.name}/{sample.key}", prepared)
            found.endings[f"images.{prepared.ending}"] += 1
            found.others.update(sample.others)
            records.append((sample.image.offset, len(data), labels.setdefault(label, len(labels)), zlib.crc32(data)))
        sha256 = hashlib.sha256(content).hexdigest()
        found.record = ShardRecord(name=path.name, bytes=len(content), sha256=sha256, samples=len(samples))
    found.classes = list(labels)
    found.index = np.array(records, dtype=INDEX_DTYPE)
    return found


def _label(sample: Sample, content: mmap.mmap) -> str:
    """The class as text; empty where the sample has none."""
    if sample.label is None:
        return ""
    text = content[sample.label.offset : sample.label.offset + sample.label.size].decode("ascii").strip()
    if not (text.isdigit() and len(text) < 10):
        raise ValueError(f"its label is {text[:40]!r}, which is no number from 0 on")
    return str(int(text))


def _assemble(directory: Path, found: list[_Found]) -> tuple[Manifest, bytes]:
    """Manifest and index of all shards."""
    faults = [fault for shard in found for fault in shard.faults]
    names = {name for shard in found for name in shard.classes}
    if "" in names and len(names) > 1:
        unlabelled = next(shard.name for shard in found if "" in shard.classes)
        faults.append(f"{unlabelled}: there are samples without a label, {CLS}, where others have one; add it")
    if faults:
        more = [f"... and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise DataError(
            "\n- ".join([f"{directory} cannot be indexed: {len(faults)} faults", *faults[:_MOST_FAULTS], *more])
        )
    findings = Findings()
    for shard in found:
        findings.merge(shard.findings)
    samples = sum(len(shard.index) for shard in found)
    try:
        findings.raise_faults(str(directory), samples)
    except DataError as error:
        raise DataError(
            f"{error}\nShards are indexed as they are; pack them: bessemer data pack {directory} DST"
        ) from None
    classes = class_order(names)
    for shard in found:
        # Labels were numbered within the shard.
        shard.index["label"] = np.array([classes.index(name) for name in shard.classes])[shard.index["label"]]
    index = np.concatenate([shard.index for shard in found])
    data = index_bytes(index)
    endings = {ending for shard in found for ending in shard.endings}
    others = sum((shard.others for shard in found), Counter[str]())
    fields: dict[str, Any] = {
        "version": 1,
        **declare(_AS_THEY_ARE, findings, endings),
        "classes": ["all"] if classes == [""] else classes,
        "class_counts": np.bincount(index["label"], minlength=len(classes)).tolist(),
        "samples": samples,
        "packing": Packing(
            source=str(directory),
            size=None,
            resize="none",
            mode=None,
            labels="none" if classes == [""] else CLS,
            split=None,
            splits=[],
            limit=None,
            passed_through=samples,
            ignored=dict(sorted(others.items())),
        ).model_dump(),
        "index": FileRecord(name=_INDEX, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()).model_dump(),
        "shards": [shard.record.model_dump() for shard in found if shard.record is not None],
    }
    return Manifest(hash=data_hash(fields), **fields), data


def _key(member: Member) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _ending(member: Member) -> str:
    return "." + PurePosixPath(member.name).name.partition(".")[2].lower()
