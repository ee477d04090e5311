"""Packing images into shards: checked, shuffled, indexed, and visible only when whole."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import PIL

from bessemer import __version__
from bessemer.data.fields import KINDS, Kind
from bessemer.data.index import index_bytes
from bessemer.data.manifest import MANIFEST, FileRecord, Manifest, Packing, data_hash
from bessemer.data.order import permutation
from bessemer.data.packing.aside import PLAN, check_destination, open_aside, publish
from bessemer.data.packing.findings import Findings, declare
from bessemer.data.packing.parallel import run_in_processes
from bessemer.data.packing.prepare import Mode, Resize, Rules
from bessemer.data.packing.shard_task import ShardResult, ShardTask, finished, pack_shard, prepare_all
from bessemer.data.packing.shards import stored_bytes
from bessemer.data.packing.verify import verify
from bessemer.data.sources.cutting import cut
from bessemer.data.sources.source import Entry, Source, open_source
from bessemer.errors import DataError
from bessemer.files import write_atomically, write_synced

__all__ = ["SHARD_BYTES", "Runner", "kind_named", "mode_named", "pack", "resize_named"]

SHARD_BYTES = 128 << 20
"""Default size of a shard."""
_INDEX = "index.npy"
_TRIED = 256
"""Images that are prepared beforehand to learn how large they become."""
Progress = Callable[[int, int | None], None]
Runner = Callable[[Callable[[ShardTask], ShardResult], Iterable[ShardTask]], Iterator[ShardResult]]
"""Does tasks in any order; yields results as they come."""


def pack(
    source: str | Path,
    destination: Path,
    *,
    kind: Kind | None = None,
    size: int | None = None,
    resize: Resize = "lanczos",
    mode: Mode | None = None,
    split: str | None = None,
    labels: str | Path | None = None,
    length: int | None = None,
    limit: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    workers: int = 1,
    threads: int | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Pack a source into a directory of WebDataset shards with index and manifest.

    Every image is decoded whole, so that a damaged one is found now and not in the middle of a run. The shards hold
    the images in an order shuffled by a fixed seed, so each holds all classes. The same input gives the same bytes,
    whatever the number of workers. A packer that was killed goes on when it is called again: what it had done of the
    same source by the same rules is taken up.

    Args:
        source: folder, archive, file of arrays, or `digits`; see :func:`bessemer.data.sources.source.open_source`.
        destination: directory to make. It appears whole, by a rename, or not at all.
        kind: what a sample is, see :mod:`bessemer.data.fields`; by default what the names in the source say.
        size: edge length in pixels; images are centre-cropped to a square and resized. None: they must be square
            and of one size already.
        resize: filter for `size`; `none` cuts the centre out without scaling.
        mode: `RGB` or `L` (grey) converts all images, laying transparency over white. None: all must have one of
            these modes already.
        split: split to take, or `all`; see :func:`bessemer.data.sources.source.open_source`.
        limit: take at most this many images of each class, the first by name.
        labels: where classes come from; see :func:`bessemer.data.sources.source.open_source`.
        length: frames of each clip, or samples of each piece of sound, that longer ones are cut into; see
            :func:`bessemer.data.sources.cutting.cut`.
        shard_bytes: size of a shard. All have the same number of images, so their sizes differ a little.
        overwrite: replace an existing data set.
        workers: processes; with 1 the work is done in this one.
        threads: decoder threads of each; by default the cores are shared out, at most 16.
        runner: does the work elsewhere, such as on a cluster, in place of processes.
        progress: called with (images done, images in all); all is None while the source is being listed.

    Raises:
        DataError: names all offenders by kind, with a few examples each, the rule, and the fix.
    """
    destination = Path(destination).absolute()
    for name, value in (
        ("size", size),
        ("length", length),
        ("limit", limit),
        ("shard_bytes", shard_bytes),
        ("workers", workers),
    ):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    check_destination(destination, overwrite)
    threads = threads or max(1, min(16, len(os.sched_getaffinity(0))) // workers)
    if progress:
        progress(0, None)
    with (
        open_aside(destination) as aside,
        open_source(source, spool_folder=aside, split=split, labels=labels, kind=kind) as opened,
    ):
        cut(opened, length)
        rules = Rules(size, resize, mode, opened.kind, opened.count, opened.rate)
        opened.entries = _choose(opened.entries, limit)
        found = {entry.class_name for entry in opened.entries}
        opened.classes = [name for name in opened.classes if name in found]
        tasks = _plan(opened, rules, shard_bytes, aside, threads)
        _keep_only_plan(tasks, aside)
        manifest = _whole(aside)
        if manifest is None:
            results = _run(tasks, workers, runner, progress)
            manifest = _describe(opened, rules, limit, results, aside)
        elif progress:
            progress(manifest.samples, manifest.samples)
        publish(aside, destination, manifest.files, overwrite)
    return manifest


def kind_named(name: str | None) -> Kind | None:
    """A kind of samples by the name that a person typed; None stays None.

    Raises:
        DataError: there is none of this name.
    """
    for known in KINDS:
        if name is not None and name.lower() == known:
            return known
    if name is None:
        return None
    raise DataError(f"kind {name!r} is unknown; choose one of {', '.join(KINDS)}")


def resize_named(name: str) -> Resize:
    """A filter by the name that a person typed.

    Raises:
        DataError: there is none of this name.
    """
    for known in get_args(Resize):
        if name.lower() == known:
            return cast("Resize", known)
    raise DataError(f"resize {name!r} is unknown; choose one of {', '.join(get_args(Resize))}")


def mode_named(name: str | None) -> Mode | None:
    """A colour mode by the name that a person typed; None stays None.

    Raises:
        DataError: there is none of this name.
    """
    for known in get_args(Mode):
        if name is not None and name.upper() == known:
            return cast("Mode", known)
    if name is None:
        return None
    raise DataError(f"mode {name!r} is unknown; choose RGB (colour) or L (grey)")


def _choose(entries: list[Entry], limit: int | None) -> list[Entry]:
    if limit is None:
        return entries
    taken: Counter[str] = Counter()
    chosen = []
    for entry in entries:  # sorted
        taken[entry.class_name] += 1
        if taken[entry.class_name] <= limit:
            chosen.append(entry)
    return chosen


def _plan(source: Source, rules: Rules, shard_bytes: int, folder: Path, threads: int) -> list[ShardTask]:
    """Cut the shuffled images into shards of equal counts, which come close to `shard_bytes`."""
    labels = {name: label for label, name in enumerate(source.classes)}
    count = len(source.entries)
    shuffled = [source.entries[place] for place in permutation(count, 0, "pack").tolist()]
    tried = prepare_all(source.files, shuffled[:_TRIED], rules, threads)
    sizes = [stored_bytes(len(one.content.data) for one in found) for _, found in tried if isinstance(found, list)]
    each = sum(sizes) / max(1, len(sizes))
    # Where the size of the rest is a guess, a little room keeps nearly all shards below the size that was asked for.
    room = shard_bytes if count <= _TRIED else 0.95 * shard_bytes
    groups = [count]
    if rules.kind == "domains":  # each has shards of its own, so that each can be read in an order of its own
        shuffled.sort(key=lambda entry: labels[entry.class_name])
        groups = [sum(labels[entry.class_name] == label for entry in shuffled) for label in range(2)]
    bounds = [0]
    for samples in groups:
        shards = min(samples, max(1, math.ceil(samples * each / room)))
        bounds += [bounds[-1] + samples * number // shards for number in range(1, shards + 1)]
    return [
        ShardTask(
            source.files.part(path for entry in shuffled[first:last] for path in entry.paths),
            [(entry, labels[entry.class_name]) for entry in shuffled[first:last]],
            rules,
            folder,
            number,
            first,
            threads,
        )
        for number, (first, last) in enumerate(pairwise(bounds))
    ]


def _run(tasks: list[ShardTask], workers: int, runner: Runner | None, progress: Progress | None) -> list[ShardResult]:
    """Make all shards but those that an interrupted packer has made of the same source by the same rules."""
    total = sum(len(task.entries) for task in tasks)
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress:
            progress(done, total)

    found = {task.number: result for task in tasks if (result := finished(task)) is not None}
    rest = [task for task in tasks if task.number not in found]
    advance(total - sum(len(task.entries) for task in rest))
    if runner is None and (workers == 1 or len(rest) < 2):
        found |= {task.number: pack_shard(task, advance) for task in rest}
    else:
        made = runner(pack_shard, rest) if runner else run_in_processes(pack_shard, rest, min(workers, len(rest)))
        for result in made:
            found[result.number] = result
            advance(len(tasks[result.number].entries))
    return [found[task.number] for task in tasks]


def _whole(folder: Path) -> Manifest | None:
    """The manifest of the data set in the folder if it lacks nothing but its name: its packer was killed at the end."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        return None if verify(folder) else Manifest.load(folder)
    except DataError:
        return None


def _describe(source: Source, rules: Rules, limit: int | None, results: list[ShardResult], folder: Path) -> Manifest:
    """Write the index and the manifest of finished shards into their folder.

    Raises:
        DataError: names all faults that were found while they were made.
    """
    findings = Findings()
    for result in results:
        findings.merge(result.findings)
    findings.raise_faults(source.name, len(source.entries))
    index = index_bytes(np.concatenate([result.index for result in results]))
    write_synced(folder / _INDEX, index)
    by_class = Counter(entry.class_name for entry in source.entries)
    endings = {ending for result in results for ending in result.endings}
    fields: dict[str, Any] = {
        "version": 1,
        **declare(rules, findings, endings),
        "classes": source.classes,
        "class_counts": [by_class[name] for name in source.classes],
        "samples": len(source.entries),
        "packing": Packing(
            source=source.name,
            size=rules.size,
            resize="none" if rules.size is None else rules.resize,
            mode=rules.mode,
            labels=source.labels,
            split=source.split,
            splits=source.splits,
            limit=limit,
            passed_through=sum(result.passed_through for result in results),
            ignored=source.ignored,
        ).model_dump(),
        "index": FileRecord(name=_INDEX, bytes=len(index), sha256=hashlib.sha256(index).hexdigest()).model_dump(),
        "shards": [result.record.model_dump() for result in results if result.record is not None],
    }
    manifest = Manifest(hash=data_hash(fields), **fields)
    manifest.save(folder)
    return manifest


def _keep_only_plan(tasks: list[ShardTask], folder: Path) -> None:
    """Remove shards in the folder that were made by another plan, and note this plan there."""
    digest = hashlib.sha256()
    # Another Pillow may compress otherwise.
    digest.update(f"{__version__} {PIL.__version__} {tasks[0].rules} {tasks[0].files.stamp()}\n".encode())
    for task in tasks:
        digest.update(f"{task.number} {task.first} {task.entries}\n".encode())
    note = folder / PLAN
    if note.exists() and note.read_bytes() == digest.hexdigest().encode():
        return
    for path in folder.iterdir():
        if not path.name.startswith("spool-"):
            path.unlink()
    write_atomically(note, lambda file: file.write(digest.hexdigest().encode()))
