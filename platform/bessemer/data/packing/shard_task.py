"""The unit of packing: one shard, made by whichever thread, process or node is free, always with the same bytes."""

from __future__ import annotations

import json
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from bessemer.data.index import INDEX_DTYPE, Index, index_bytes
from bessemer.data.manifest import ShardRecord
from bessemer.data.packing.findings import Findings
from bessemer.data.packing.prepare import Rules
from bessemer.data.packing.samples import StoredFile, prepare_sample
from bessemer.data.packing.shards import ShardWriter
from bessemer.data.sources.archives import Files
from bessemer.data.sources.source import Entry
from bessemer.errors import DataError
from bessemer.files import file_sha256, write_atomically

__all__ = ["ShardResult", "ShardTask", "finished", "pack_shard", "prepare_all"]

_CHUNK = 64


@dataclass(frozen=True)
class ShardTask:
    """What goes into one shard. Small to send to another process."""

    files: Files
    entries: list[tuple[Entry, int]]
    """The samples in their order, and their labels."""
    rules: Rules
    folder: Path
    """Where the shard goes."""
    number: int
    """Of the shard."""
    first: int
    """Number of its first sample."""
    threads: int
    """Decoder threads."""

    @property
    def path(self) -> Path:
        """Of the shard."""
        return self.folder / f"shard-{self.number:06d}.tar"


@dataclass
class ShardResult:
    """A shard that was made, or what is wrong with its images."""

    number: int
    findings: Findings
    record: ShardRecord | None = None
    """None where the findings are faulty."""
    index: Index = field(default_factory=lambda: np.empty(0, dtype=INDEX_DTYPE))
    endings: Counter[str] = field(default_factory=Counter)
    """Files by field and ending, such as `images.jpg`."""
    passed_through: int = 0


def pack_shard(task: ShardTask, advance: Callable[[int], object] | None = None) -> ShardResult:
    """Make one shard; after the first fault only look for further ones.

    A note beside the shard, written last, lets :func:`finished` take it up after an interruption.

    Args:
        task: what goes into it.
        advance: called with the number of samples since the last call.

    Raises:
        DataError: the folder is not there, as on a node without the file system of the others.
    """
    if not task.folder.is_dir():
        raise DataError(
            f"{task.folder} is not there on {socket.gethostname()}; source and destination must lie on a file system "
            f"that all nodes of the cluster share"
        )
    result = ShardResult(task.number, Findings())
    labels = [label for _, label in task.entries]
    writer = ShardWriter(task.path, task.first)
    try:
        prepared = prepare_all(task.files, [entry for entry, _ in task.entries], task.rules, task.threads)
        for done, ((entry, stored), label) in enumerate(zip(prepared, labels, strict=True), start=1):
            if isinstance(stored, ValueError):
                result.findings.refuse(str(entry.path), stored)
            else:
                for one in stored:
                    result.findings.see(str(entry.path), one.content, one.field)
                if not result.findings.faulty:
                    writer.add([(one.name, one.content.data) for one in stored], label)
                    result.endings.update(f"{one.field}.{one.content.ending}" for one in stored)
                    result.passed_through += all(one.content.passed_through for one in stored)
            if advance and (done % _CHUNK == 0 or done == len(labels)):
                advance(done % _CHUNK or _CHUNK)
    except BaseException:
        writer.abandon()
        raise
    finally:
        task.files.close()
    if result.findings.faulty:
        writer.abandon()
    else:
        result.record, result.index = writer.finish()
        _write_note(task, result)
    return result


def finished(task: ShardTask) -> ShardResult | None:
    """The shard of a task as an interrupted packer left it; None where it is not there whole."""
    try:
        note = json.loads(_note(task).read_bytes())
        record = ShardRecord.model_validate(note["record"])
        index: Index = np.load(_index(task), allow_pickle=False)
        result = ShardResult(
            task.number,
            Findings.clean(**note["findings"]),
            record,
            index,
            Counter(note["endings"]),
            note["passed_through"],
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    whole = (
        len(index) == record.samples == len(task.entries)
        and task.path.is_file()
        and task.path.stat().st_size == record.bytes
        and file_sha256(task.path) == record.sha256
    )
    return result if whole else None


def _write_note(task: ShardTask, result: ShardResult) -> None:
    assert result.record is not None
    note = {
        "record": result.record.model_dump(),
        "findings": result.findings.as_clean(),
        "endings": dict(result.endings),
        "passed_through": result.passed_through,
    }
    write_atomically(_index(task), lambda file: file.write(index_bytes(result.index)))
    write_atomically(_note(task), lambda file: file.write(json.dumps(note).encode()))


def _note(task: ShardTask) -> Path:
    return task.path.with_suffix(".json")


def _index(task: ShardTask) -> Path:
    return task.path.with_suffix(".npy")


def prepare_all(
    files: Files, entries: list[Entry], rules: Rules, threads: int
) -> Iterator[tuple[Entry, list[StoredFile] | ValueError]]:
    """Prepare samples in threads, in order, with a bounded number of them in memory."""

    def attempt(entry: Entry) -> list[StoredFile] | ValueError:
        try:
            return prepare_sample(files, entry, rules)
        except ValueError as error:
            return error

    def work(chunk: list[Entry]) -> list[tuple[Entry, list[StoredFile] | ValueError]]:
        return [(entry, attempt(entry)) for entry in chunk]

    rest = iter(entries)
    with ThreadPoolExecutor(threads, thread_name_prefix="bessemer-pack") as pool:
        pending: deque[Future[list[tuple[Entry, list[StoredFile] | ValueError]]]] = deque()
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
