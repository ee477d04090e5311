"""What forked workers do with the tiny adversarial system of scripts/tiny_run.py: train it until something happens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.training.scripts import tiny_run
from torch import Tensor

from bessemer.spec.job import JobSpec
from bessemer.stores.local import LocalStore
from bessemer.stores.opening import open_store
from bessemer.stores.store import Patience
from bessemer.systems.contract import Batch
from bessemer.tracking.journal import Record, read_journal
from bessemer.training.checkpoint import CheckpointStore
from bessemer.training.distributed import init_deepspeed, join_workers
from bessemer.training.fragments import gather_full
from bessemer.training.loop import Trainer
from bessemer.training.peers import watch_peers
from bessemer.training.remote_checkpoints import RemoteCheckpoints
from bessemer.training.stopping import EXIT_STOPPED, StopRequest
from bessemer.training.uploads import Uploads

IMAGES = 2 * tiny_run.BATCH
"""Real images of one iteration."""


class Observed:
    """A stream that tells another process how far the run is, and can slow it down."""

    def __init__(self, stream: Any, seen: Any, pace: float) -> None:
        self._stream, self._seen, self._pace = stream, seen, pace

    def batch(self, nimg: int) -> list[Batch]:
        if self._seen is not None:
            self._seen.value = nimg
        time.sleep(self._pace)
        batches: list[Batch] = self._stream.batch(nimg)
        return batches


class Paced(LocalStore):
    """A store that takes its time."""

    pace = 0.0

    def put(self, name: str, path: Path) -> None:
        time.sleep(self.pace)
        super().put(name, path)


def make_uploads(root: Path, job: JobSpec, pace: float) -> Uploads:
    """Uploads of the tiny run, below the name `tiny`."""
    assert job.checkpoint.upload is not None
    patience = Patience(attempts=2, pause=0.01, timeout=5)
    place = f"{job.checkpoint.upload}/tiny"
    store = Paced(place, patience) if pace else open_store(place, patience)
    if isinstance(store, Paced):
        store.pace = pace
    (root / "run.json").write_text('{"id": "tiny"}')
    return Uploads(RemoteCheckpoints(store), root / "checkpoints", job.checkpoint, root)


def job_of(stage: int, iterations: int, workers: int, **checkpoint: Any) -> JobSpec:
    """The tiny job; checkpoints every 4 iterations unless `checkpoint` says otherwise."""
    job = tiny_run.make_job(stage, iterations, workers)
    return job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update=checkpoint)})


@torch.no_grad()
def full_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that resuming must bring back, as whole tensors on every worker. Collective."""
    state = {f"ema.{k}": v for k, v in trainer.ema_state().items()}
    for name, network in trainer.system.networks().items():
        state |= {f"{name}.{k}": v.detach().clone() for k, v in network.state_dict().items()}
    for name, engine in trainer.engines.items():
        shapes = {k: p.shape for k, p in engine.module.named_parameters()}
        state[f"{name}.steps"] = torch.tensor(engine.optimizer_steps())
        kinds = {"weight": engine.fragments(), **engine.state_fragments()}
        for key, fragments in kinds.items():
            whole = gather_full(fragments, shapes, trainer.workers)
            state |= {f"{name}.{key}.{k}": v for k, v in whole.items()}
    return state


def train(
    root: Path,
    stage: int,
    iterations: int,
    checkpoint: Mapping[str, Any],
    seen: Any = None,
    pace: float = 0.0,
    clock_shift: float = 0.0,
    upload_pace: float = 0.0,
) -> int:
    """Train from the newest checkpoint below `root` to the end, and leave the final state in `final.safetensors`.

    Args:
        root: directory of the run.
        stage: ZeRO stage.
        iterations: length of the run.
        checkpoint: fields of the job's section.
        seen: shared integer that is set to the images seen.
        pace: seconds to sleep per batch.
        clock_shift: seconds that the clock of this process is wrong by.
        upload_pace: seconds to sleep per file that is uploaded.
    """
    if clock_shift:
        right = time.time
        time.time = lambda: right() + clock_shift
    stop = StopRequest(root / ".stop")
    stop.listen()
    with join_workers() as workers, watch_peers(workers):
        init_deepspeed(workers.device)
        job = job_of(stage, iterations, workers.size, **checkpoint)
        trainer = tiny_run.make_trainer(job, root, workers)
        trainer.stop_requested = stop
        trainer.stream = Observed(trainer.stream, seen if workers.is_first else None, pace)
        uploads = make_uploads(root, job, upload_pace) if workers.is_first and job.checkpoint.upload else None
        trainer.checkpoints = CheckpointStore(root / "checkpoints", job.checkpoint, workers, uploads=uploads)
        trainer.resume()
        if not trainer.run():
            return EXIT_STOPPED
        state = full_state(trainer)
        if workers.is_first:
            save_file(state, root / "final.safetensors")
        workers.barrier()
    return 0


def events(root: Path, *names: str) -> list[Record]:
    """Events of these names in the journal of a run."""
    return [r for r in read_journal(root / "journal.jsonl") if r["kind"] == "event" and r["event"] in names]


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended with the same tensors, to the last bit."""
    ours, theirs = load_file(a / "final.safetensors"), load_file(b / "final.safetensors")
    assert ours.keys() == theirs.keys()
    assert any(".exp_avg_sq." in key for key in ours)
    different = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    assert not different


__all__ = ["IMAGES", "assert_same", "events", "full_state", "job_of", "train"]
