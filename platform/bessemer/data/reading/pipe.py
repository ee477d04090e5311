"""Data sets behind a shell command, for jobs that set ``data.allow_pipe``."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import BinaryIO

from bessemer.stores.store import Patience, Store, TransientError

__all__ = ["PipeStore"]

_BLOCK = 1 << 20


class PipeStore(Store):
    """Files that a command writes to its standard output: ``pipe:ssh host cat /data/set/{name}``.

    Args:
        url: `pipe:` and the command; a shell runs it with the quoted name of a file in place of ``{name}``.
        patience: how often a command that fails is run.
    """

    def __init__(self, url: str, patience: Patience = Patience(attempts=3)) -> None:  # noqa: B008  # frozen
        super().__init__(url, patience)
        self._command = url.removeprefix("pipe:")

    def shown(self, name: str) -> str:
        return f"{self.url} ({name})"

    def size(self, name: str) -> int:
        return len(self.read(name))

    def put(self, name: str, path: Path) -> None:  # noqa: ARG002
        raise self.failed(name, "a command can only be read from")

    def list(self, prefix: str = "") -> dict[str, int]:
        raise self.failed(prefix, "a command can only be read from")

    def delete(self, name: str) -> None:
        raise self.failed(name, "a command can only be read from")

    def _copy(self, name: str, file: BinaryIO, start: int, stop: int | None, size: int | None) -> None:
        begin = file.tell()

        def run() -> int:
            file.seek(begin)
            file.truncate()
            return self._run(name, file, start, stop)

        found = self.trying(name, run)
        if size is not None and found != size:
            raise self.failed(name, f"has {found} bytes, expected {size}")

    def _run(self, name: str, file: BinaryIO, start: int, stop: int | None) -> int:
        """Write the bytes `start` to `stop` of a command's output to a file; how many it had in all."""
        command = self._command.replace("{name}", shlex.quote(name))
        # The job allowed it by name.
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:  # noqa: S602
            assert process.stdout is not None
            total = 0
            while block := process.stdout.read(_BLOCK):
                first, last = max(start - total, 0), len(block) if stop is None else max(stop - total, 0)
                file.write(block[first:last])
                total += len(block)
        if process.returncode:
            raise TransientError(f"the command ended with {process.returncode}")
        return total
