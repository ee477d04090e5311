"""Shows a run while it trains: kimg, images per second, losses, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bessemer.orchestration.run_directory import RunDirectory

__all__ = ["follow_run"]

_POLL_S = 0.5


@contextmanager
def follow_run(run: RunDirectory) -> Iterator[None]:
    """Follow the journal of `run` meanwhile: a live bar on a terminal, lines elsewhere."""
    from bessemer.tracking.journal import read_entries

    journal = run.path / "journal.jsonl"
    entries = read_entries(journal)
    offset = entries[-1].end if entries else 0
    display = _Display(run.job().training.total_kimg)
    stop = threading.Event()

    def follow() -> None:
        nonlocal offset
        while True:
            ending = stop.is_set()
            for entry in read_entries(journal, offset):
                offset = entry.end
                display.show(entry.record)
            if ending:
                return
            stop.wait(_POLL_S)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    with display:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class _Display:
    def __init__(self, total_kimg: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._total = total_kimg
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._speed = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.fields[kimg]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=total_kimg, kimg=self._kimg(0), detail="starting workers")

    def _kimg(self, value: float) -> str:
        return f"{value:.1f}/{self._total:g} kimg"

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        sys.stderr.flush()

    def show(self, record: dict[str, Any]) -> None:
        """Show one record of the journal."""
        kimg = record["nimg"] / 1000
        if record["kind"] == "metrics":
            self._metrics(kimg, record["values"])
        elif record["kind"] == "evaluation":
            error = record.get("standard_error")
            spread = f" ± {error:.4f}" if error is not None else ""
            self._say(f"{kimg:8.1f} kimg  {record['metric']} {record['value']:.4f}{spread}")
        elif record["kind"] == "event":
            self._event(kimg, record)

    def _metrics(self, kimg: float, values: dict[str, float | None]) -> None:
        speed = values.get("throughput/img_per_s") or 0.0
        # The first steps are slow, and a single line is noisy: smooth what the time left is computed from.
        self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
        left = max(self._total - kimg, 0.0) * 1000 / max(self._speed, 1e-9)
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("loss/") and value is not None
        )
        detail = f"{speed:6.1f} img/s  loss {losses}  left {time.strftime('%H:%M:%S', time.gmtime(left))}"
        self._progress.update(self._task, completed=kimg, kimg=self._kimg(kimg), detail=detail)
        if not self._live:
            self._say(f"{self._kimg(kimg)}  {detail}")

    def _event(self, kimg: float, record: dict[str, Any]) -> None:
        name = record.get("event")
        if name in ("checkpoint", "uploaded", "snapshot", "evaluated", "placed"):
            if name == "checkpoint":
                self._progress.update(self._task, completed=kimg, kimg=self._kimg(kimg))
            return
        more = {
            "resumed": lambda: f"from {record.get('checkpoint') or 'the beginning'}",
            "workers_lost": lambda: "; ".join(f"worker {k}: {v}" for k, v in (record.get("reasons") or {}).items()),
            "note": lambda: str(record.get("reason")),
            "waiting": lambda: str(record.get("reason")),
            "resized": lambda: f"{record.get('workers')} of {record.get('wanted')} workers",
            "checkpoint_skipped": lambda: str(record.get("reason")),
            "checkpoint_failed": lambda: str(record.get("reason")),
            "upload_failed": lambda: str(record.get("reason")),
            "update_skipped": lambda: str(record.get("reason")),
            "collapse_suspected": lambda: f"by guards.{record.get('rule')}; action {record.get('action')}",
            "rolled_back": lambda: str(record.get("reason")),
            "stopped_early": lambda: str(record.get("reason")),
            "evaluation_skipped": lambda: str(record.get("reason")),
            "evaluation_failed": lambda: str(record.get("reason")),
        }.get(str(name), lambda: "")()
        self._say(f"{kimg:8.1f} kimg  {name} {more}".rstrip())

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
