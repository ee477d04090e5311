"""Packing images into shards: checked, shuffled, indexed, and visible only when whole."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from bessemer.data.findings import Findings
from bessemer.data.index import index_bytes
from bessemer.data.manifest import MANIFEST, FileRecord, Manifest, Packing, data_hash
from bessemer.data.order import permutation
from bessemer.data.prepare import Mode, Prepared, Resize, Rules, prepare
from bessemer.data.shards import ShardWriter
from bessemer.data.sources import Entry, Source, open_source
from bessemer.errors import DataError
from bessemer.files import sync, write_synced

__all__ = ["SHARD_BYTES", "mode_named", "pack", "resize_named"]

SHARD_BYTES = 128 << 20
"""Default size of a shard."""
_INDEX = "index.npy"
_CHUNK = 64
_PARTIAL, _REPLACED = _ASIDE = ("partial", "replaced")
Progress = Callable[[int, int | None], None]


def pack(
    source: str | Path,
    destination: Path,
    *,
    size: int | None = None,
    resize: Resize = "lanczos",
    mode: Mode | None = None,
    split: str | None = None,
    limit: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Pack a source into a directory of WebDataset shards with index and manifest.

    Every image is decoded whole, so that a damaged one is found now and not in the middle of a run. The shards hold
    the images in an order shuffled by a fixed seed, so each holds all classes; the same input gives the same bytes.

    Args:
        source: folder, archive, or `digits`; see :func:`bessemer.data.sources.open_source`.
        destination: directory to make. It appears whole, by a rename, or not at all.
        size: edge length in pixels; images are centre-cropped to a square and resized. None: they must be square
            and of one size already.
        resize: filter for `size`; `none` cuts the centre out without scaling.
        mode: `RGB` or `L` (grey) converts all images, laying transparency over white. None: all must have one of
            these modes already.
        split: split to take, or `all`; see :func:`bessemer.data.sources.open_source`.
        limit: take at most this many images of each class, the first by name.
        shard_bytes: largest size of a shard.
        overwrite: replace an existing data set.
        threads: decoder threads; the number of cores by default, at most 16.
        progress: called with (images done, images in all); all is None while the source is being listed.

    Raises:
        DataError: names all offenders by kind, with a few examples each, the rule, and the fix.
    """
    destination = Path(destination).absolute()
    for name, value in (("size", size), ("limit", limit), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    _check_destination(destination, overwrite)
    rules = Rules(size, resize, mode)
    if progress:
        progress(0, None)
    with _aside(destination) as aside, open_source(source, spool_folder=aside, split=split) as opened:
        entries = _choose(opened.entries, limit)
        classes = sorted({entry.class_name for entry in entries})
        writer = ShardWriter(aside, shard_bytes)
        try:
            summary = _write(opened, entries, classes, rules, writer, threads, progress)
            index = index_bytes(writer.finish())
        finally:
            writer.abandon()
        write_synced(aside / _INDEX, index)
        by_class = Counter(entry.class_name for entry in entries)
        fields: dict[str, Any] = {
            "version": 1,
            "resolution": summary.resolution,
            "channels": summary.channels,
            "encoding": summary.encoding,
            "classes": classes,
            "class_counts": [by_class[name] for name in classes],
            "samples": len(entries),
            "packing": Packing(
                source=opened.name,
                size=size,
                resize="none" if size is None else resize,
                mode=mode,
                split=opened.split,
                splits=opened.splits,
                limit=limit,
                passed_through=summary.passed_through,
                ignored=opened.ignored,
            ).model_dump(),
            "index": FileRecord(name=_INDEX, bytes=len(index), sha256=hashlib.sha256(index).hexdigest()).model_dump(),
            "shards": [shard.model_dump() for shard in writer.shards],
        }
        manifest = Manifest(hash=data_hash(fields), **fields)
        manifest.save(aside)
        _publish(aside, destination, overwrite)
    return manifest


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


class _Summary:
    """What the images have in common."""

    def __init__(self, findings: Findings, endings: Counter[str], passed_through: int):
        self.resolution = findings.resolution
        self.channels = 3 if findings.mode == "RGB" else 1
        self.encoding = next(iter(endings)) if len(endings) == 1 else "mixed"
        self.passed_through = passed_through


def _write(
    source: Source,
    entries: list[Entry],
    classes: list[str],
    rules: Rules,
    writer: ShardWriter,
    threads: int | None,
    progress: Progress | None,
) -> _Summary:
    """Write all entries in shuffled order; after the first fault only look for further ones."""
    findings = Findings(source.name, len(entries))
    labels = {name: label for label, name in enumerate(classes)}
    endings: Counter[str] = Counter()
    passed_through = 0
    shuffled = [entries[place] for place in permutation(len(entries), 0, "pack").tolist()]
    for done, (entry, prepared) in enumerate(_prepare_all(source, shuffled, rules, threads), start=1):
        findings.see(str(entry.path), prepared)
        if isinstance(prepared, Prepared) and not findings.faulty:
            writer.add(prepared.data, prepared.ending, labels[entry.class_name])
            endings[prepared.ending] += 1
            passed_through += prepared.passed_through
        if progress and (done % 100 == 0 or done == len(entries)):
            progress(done, len(entries))
    findings.raise_faults()
    return _Summary(findings, endings, passed_through)


def _prepare_all(
    source: Source, entries: list[Entry], rules: Rules, threads: int | None
) -> Iterator[tuple[Entry, Prepared | ValueError]]:
    """Prepare in threads, in order, with a bounded number of images in memory."""

    def attempt(entry: Entry) -> Prepared | ValueError:
        try:
            return prepare(source.read(entry), rules)
        except ValueError as error:
            return error

    def work(chunk: list[Entry]) -> list[tuple[Entry, Prepared | ValueError]]:
        return [(entry, attempt(entry)) for entry in chunk]

    threads = threads or min(16, len(os.sched_getaffinity(0)))
    rest = iter(entries)
    with ThreadPoolExecutor(threads, thread_name_prefix="bessemer-pack") as pool:
        pending: deque[Future[list[tuple[Entry, Prepared | ValueError]]]] = deque()
        try:
            while True:
                while len(pending) < 2 * threads and (chunk := list(islice(rest, _CHUNK))):
                    pending.append(pool.submit(work, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


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


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not destination.exists() and not destination.is_symlink():
        return
    if not destination.is_dir() or destination.is_symlink():
        raise DataError(f"destination {destination} is a file or a link; choose another place")
    if not any(destination.iterdir()):
        return
    if not (destination / MANIFEST).exists():
        raise DataError(
            f"destination {destination} is a folder with other things in it, which are never deleted; choose a new "
            f"place"
        )
    if not overwrite:
        raise DataError(f"destination {destination} exists; choose another place, or replace it with --overwrite")


@contextmanager
def _aside(destination: Path) -> Iterator[Path]:
    """A locked directory beside the destination; removed if it is still there at the end."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination)
        aside = destination.parent / f".{destination.name}.{_PARTIAL}-{uuid.uuid4().hex[:8]}"
        aside.mkdir()
    except OSError as error:
        raise DataError(
            f"destination {destination} cannot be made: {error.strerror}; choose a place where you may write"
        ) from None
    lock = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(lock)
        yield aside
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"destination {destination}: {error.strerror}; free some space and pack again") from None
    finally:
        os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a packer that is alive, or not supported here
        return False
    return True


def _remove_abandoned(destination: Path) -> None:
    """Remove what killed packers of the same destination left behind."""
    name = glob.escape(destination.name)
    for left in [path for kind in _ASIDE for path in destination.parent.glob(f".{name}.{kind}-????????")]:
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # gone already
            continue
        if _lock(descriptor):
            shutil.rmtree(left, ignore_errors=True)
        os.close(descriptor)


def _publish(aside: Path, destination: Path, overwrite: bool) -> None:
    sync(aside)
    _check_destination(destination, overwrite)  # it may have appeared meanwhile
    old: Path | None = None
    if destination.exists() and any(destination.iterdir()):
        old = destination.parent / f".{destination.name}.{_REPLACED}-{uuid.uuid4().hex[:8]}"
        destination.rename(old)
    aside.rename(destination)
    sync(destination.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
