"""The checkpoints of a run in a store: what is there, and how they get there and back.

::

    <checkpoint.upload>/<name of the run>/
        job.yaml, run.json, journal.jsonl     as they were at the last upload
        checkpoints/kimg-000012.800/          the files of a local checkpoint; manifest.json comes last and goes first

A store cannot rename, so there the manifest says what is complete: without it nobody looks at a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from bessemer.errors import CheckpointError, RunError, StoreError
from bessemer.files import hidden_name, sync
from bessemer.stores.opening import open_store
from bessemer.stores.store import MissingObjectError, Store
from bessemer.training.checkpoint_files import FORMAT, MANIFEST, STATE, CheckpointInfo, verify_checkpoint

__all__ = ["RemoteCheckpoints"]

_FILES_AT_ONCE = 4
_FOLDER = "checkpoints"


class RemoteCheckpoints:
    """The checkpoints of one run in a store.

    Args:
        store: at the run's place.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def of_run(cls, upload: str, run: str) -> RemoteCheckpoints:
        """Those of a run by its name, below `checkpoint.upload`."""
        return cls(open_store(f"{upload.rstrip('/')}/{run}"))

    def shown(self, name: str) -> str:
        """A checkpoint for messages."""
        return self.store.shown(f"{_FOLDER}/{name}")

    def listing(self) -> dict[str, dict[str, int]]:
        """Checkpoint -> its files and their bytes, oldest first; also what is not complete."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self.store.list(f"{_FOLDER}/kimg-").items():
            parts = PurePosixPath(path).parts
            if len(parts) == 3:
                found.setdefault(parts[1], {})[parts[2]] = size
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        return [name for name, files in self.listing().items() if MANIFEST in files]

    def check_owner(self, record: Path) -> None:
        """Refuse the place if another run keeps its checkpoints there.

        Args:
            record: `run.json` of this run.

        Raises:
            RunError: it is taken.
        """
        try:
            theirs = json.loads(self.store.read("run.json"))["id"]
        except MissingObjectError:
            return
        except (ValueError, KeyError, TypeError) as e:
            raise RunError(f"{self.store.shown('run.json')}: is no record of a run ({e!r}); delete it.") from None
        if theirs != json.loads(record.read_text())["id"]:
            raise RunError(
                f"checkpoint.upload: {self.store.name} holds the checkpoints of another run; go on with that one "
                f"(bessemer resume {self.store.name}), or give this one another name or another checkpoint.upload."
            )

    def holds(self, path: Path) -> bool:
        """Whether a local checkpoint is complete in the store, as its manifest tells."""
        try:
            return self.store.read(f"{_FOLDER}/{path.name}/{MANIFEST}") == (path / MANIFEST).read_bytes()
        except MissingObjectError:
            return False

    def upload(self, path: Path, beside: Iterable[Path] = (), is_wanted: Callable[[], bool] = lambda: True) -> int:
        """Store a complete checkpoint, unless it is there already.

        Args:
            path: its directory.
            beside: files of the run that are stored with it, where they exist.
            is_wanted: asked before each file; once it says no, the checkpoint will not become complete.

        Returns:
            Bytes that were sent.

        Raises:
            StoreError: it could not be stored.
            OSError: a file cannot be read.
        """
        if self.holds(path):
            return 0
        place = f"{_FOLDER}/{path.name}"
        names = list(json.loads((path / MANIFEST).read_text())["files"])
        self.store.delete(f"{place}/{MANIFEST}")

        def put(name: str) -> int:
            if not is_wanted():
                raise CheckpointError(f"{path}: is not wanted any more.")
            self.store.put(f"{place}/{name}", path / name)
            return (path / name).stat().st_size

        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="upload") as pool:
            sent = sum(pool.map(put, names))
        with tempfile.TemporaryDirectory() as folder:
            for file in beside:
                if file.exists():  # a copy: the journal grows meanwhile
                    self.store.put(file.name, Path(shutil.copy(file, folder)))
        return sent + put(MANIFEST)

    def delete(self, name: str) -> None:
        """Delete a checkpoint, complete or not; it is not complete from the first moment on."""
        files = self.listing().get(name, {})
        for file in sorted(files, key=lambda file: file != MANIFEST):
            self.store.delete(f"{_FOLDER}/{name}/{file}")

    def fetch(self, name: str, root: Path) -> Path:
        """Copy a checkpoint into a directory of checkpoints, every byte checked, in place of one of its name.

        Raises:
            CheckpointError: it is damaged; the message names the file.
            StoreError: it cannot be read.
            OSError: it cannot be written.
        """
        final = root / name
        aside = hidden_name(final)
        root.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        try:
            manifest = self.store.read(f"{_FOLDER}/{name}/{MANIFEST}")
            for file, entry in self._files(name, manifest).items():
                with (aside / file).open("wb") as target:
                    self._download(name, file, target, entry)
                sync(aside / file)
            (aside / MANIFEST).write_bytes(manifest)
            sync(aside / MANIFEST)
            verify_checkpoint(aside)
            sync(aside)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            sync(root)
        except CheckpointError as e:
            raise CheckpointError(str(e).replace(str(aside), self.shown(name))) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return final

    def _download(self, name: str, file: str, target: BinaryIO, entry: dict[str, Any]) -> None:
        """Like the store's; an object that is missing or of another size is damage to the checkpoint."""
        path = f"{_FOLDER}/{name}/{file}"
        found = self.store.size(path) if self.store.exists(path) else None
        if found is None:
            raise CheckpointError(f"{self.store.shown(path)}: is missing.")
        if found != entry["bytes"]:
            raise CheckpointError(f"{self.store.shown(path)}: has {found} bytes, the manifest says {entry['bytes']}.")
        self.store.download(path, target, size=entry["bytes"])

    def _files(self, name: str, manifest: bytes) -> dict[str, dict[str, Any]]:
        """File -> bytes and sha256, as a manifest says."""
        try:
            value = json.loads(manifest)
            files: dict[str, dict[str, Any]] = {
                file: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for file, entry in value["files"].items()
            }
            # Names become files here: they must not lead anywhere else.
            if value["format"] != FORMAT or not all(PurePosixPath(file).name == file for file in files):
                raise ValueError("another format, or files elsewhere")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.shown(name)}/{MANIFEST}: cannot be read ({e!r}).") from None
        return files

    def describe(self, name: str, present: dict[str, int], *, content: bool = False) -> CheckpointInfo:
        """Describe a checkpoint without copying it here.

        Args:
            name: of the checkpoint.
            present: its files and their bytes, as :meth:`listing` says.
            content: read and check every byte; otherwise only names and sizes of its files.
        """
        nimg = workers = stage = None
        try:
            wrong = self._damage(name, present, content=content)
            state = json.loads(self.store.read(f"{_FOLDER}/{name}/{STATE}"))
            nimg, workers = int(state["nimg"]), int(state["workers"])
            stage = int(next(iter(state["zero_stage"].values())))
        except MissingObjectError as e:
            wrong = str(e)
        except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as e:
            wrong = wrong or f"{self.shown(name)}/{STATE}: cannot be read ({e!r})."
        return CheckpointInfo(name, None if nimg is None else nimg / 1000, sum(present.values()), workers, stage, wrong)

    def _damage(self, name: str, present: dict[str, int], *, content: bool) -> str | None:
        try:
            for file, entry in self._files(name, self.store.read(f"{_FOLDER}/{name}/{MANIFEST}")).items():
                where = f"{self.shown(name)}/{file}"
                if file not in present:
                    return f"{where}: is missing."
                if present[file] != entry["bytes"]:
                    return f"{where}: has {present[file]} bytes, the manifest says {entry['bytes']}."
                if content:
                    digest = _Digest()
                    self.store.download(f"{_FOLDER}/{name}/{file}", cast("BinaryIO", digest), size=entry["bytes"])
                    if digest.sha256.hexdigest() != entry["sha256"]:
                        return f"{where}: sha256 differs from the manifest."
        except (CheckpointError, StoreError) as e:
            return str(e)
        return None


class _Digest(io.RawIOBase):
    """A file that keeps of what is written only the hash."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)
