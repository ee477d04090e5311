"""The evaluator: a process beside a run that judges its snapshots while training goes on.

The run directory is all that it shares with the trainer, so either may die and come back. Ray starts it where the job
says `evaluation.beside`; beside torchrun it is started by hand, on any machine that sees the run directory::

    python -m bessemer.orchestration.evaluator runs/mine
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from bessemer.data.reading.opening import open_job_data
from bessemer.errors import BessemerError
from bessemer.orchestration.backlog import Backlog, Published, split
from bessemer.orchestration.evaluation import Judge
from bessemer.orchestration.logs import log_to_file
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.systems.snapshot import load_snapshot
from bessemer.tracking.files import hold_lock
from bessemer.training.distributed import Workers
from bessemer.training.saving import reason as describe

__all__ = ["Evaluator"]

_log = logging.getLogger("bessemer.orchestration.evaluator")
_LOOK_SECONDS = 1.0


class Evaluator:
    """Judges a run's snapshots, the newest first, until training is over and nothing waits.

    Args:
        run: the run.
        threads: CPU threads.
        device: where to draw and judge.
    """

    def __init__(self, run: RunDirectory, threads: int = 1, device: torch.device | str = "cpu") -> None:
        self._run, self._job = run, run.job()
        self._workers = Workers(rank=0, size=1, device=torch.device(device))
        self._backlog = Backlog(run.journal.path)
        torch.set_num_threads(threads)

    def run(self, *, once: bool = False) -> None:
        """Judge what comes.

        Args:
            once: judge what waits now, and do not wait for more.

        Raises:
            RunError: another evaluator is at work on this run.
            DataError: the data set cannot be read.
        """
        with hold_lock(self._run.path / ".evaluator.lock"), open_job_data(self._job.data) as dataset:
            log_to_file(self._run, "evaluator")
            _log.info("evaluator, process %d", os.getpid())
            judge = Judge(self._run, self._job, dataset, self._workers, self._run.journal.write)
            while True:
                waiting = self._backlog.read()
                for published in self._leave_out(waiting)[:1]:  # then look again: something newer may have come
                    self._judge(judge, published)
                if not waiting:
                    if self._backlog.over or once:
                        return
                    time.sleep(_LOOK_SECONDS)

    def _leave_out(self, waiting: list[Published]) -> list[Published]:
        """What to judge, in this order; what is too much is left out, and the journal says so."""
        most = self._job.evaluation.backlog
        wanted, beyond = split(waiting, most)
        for published in beyond:
            reason = f"{len(waiting)} snapshots wait (evaluation.backlog: {most})"
            self._note(published, "evaluation_skipped", reason=reason)
        return wanted

    def _judge(self, judge: Judge, published: Published) -> None:
        began = time.monotonic()
        _log.info("judging %s", published.path)
        try:
            system, info = load_snapshot(self._run.path / published.path, str(self._workers.device))
            if info.weights_sha256 != published.weights_sha256:
                self._note(published, "evaluation_skipped", reason="the run went back, and wrote others since")
            elif judge(system, info, wanted=lambda: published in self._backlog.read()):
                self._note(published, "evaluated", seconds=round(time.monotonic() - began, 3))
        except (BessemerError, OSError, RuntimeError) as e:
            _log.exception("%s could not be judged", published.path)
            self._note(published, "evaluation_failed", reason=describe(e))

    def _note(self, published: Published, event: str, **fields: object) -> None:
        more = {"weights_sha256": published.weights_sha256, **fields}
        self._run.journal.write("event", published.nimg, event=event, **more)


def main() -> int:
    """Entry point; returns the exit code: 0, or 2 after a mistake that a person must fix."""
    parser = argparse.ArgumentParser(description="Judge a run's snapshots while it is trained.")
    parser.add_argument("run", type=Path, help="run directory; its job has evaluation.beside")
    parser.add_argument("--once", action="store_true", help="judge what waits now, then end")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:1")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))  # what is not judged still waits
    try:
        Evaluator(RunDirectory.open(options.run), options.threads, options.device).run(once=options.once)
    except BessemerError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
