"""Saved by 1, 2, 3 or 4 workers at ZeRO 0, 1 or 2, restored by any other number at any other stage: the same tensors.

All 144 pairs, in few processes: each group of workers saves at every stage, then each restores what all have saved.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.forked import start_group, wait_for_group
from tests.training.scripts import tiny_run
from tests.training.tiny_work import full_state

from bessemer.training.distributed import init_deepspeed, join_workers

SIZES, STAGES = (1, 2, 3, 4), (0, 1, 2)
ITERATIONS = 3


def place(root: Path, size: int, stage: int) -> Path:
    return root / f"{size}-workers-zero-{stage}"


def save_at_each_stage(root: Path) -> None:
    """Train a little, save, and leave the whole state beside the checkpoint, gathered through memory alone."""
    with join_workers() as workers:
        init_deepspeed(workers.device)
        for stage in STAGES:
            job = tiny_run.make_job(stage, ITERATIONS, workers=1)
            here = place(root, workers.size, stage)
            trainer = tiny_run.make_trainer(job, here, workers)
            # 3 workers do not divide the 4 slices: each takes one, and the run is another for each size
            trainer.slices = [workers.rank]
            trainer.stream = tiny_run.FixedStream(trainer.slices)
            assert trainer.run()
            state = full_state(trainer)
            if workers.is_first:
                save_file(state, here / "expected.safetensors")


def restore_at_each_stage(root: Path) -> None:
    """Restore every checkpoint into engines of every stage; leave the number of pairs that were compared."""
    with join_workers() as workers:
        init_deepspeed(workers.device)
        compared = 0
        for stage in STAGES:
            trainer = tiny_run.make_trainer(tiny_run.make_job(stage, ITERATIONS, workers=1), root / "none", workers)
            for size, saved_stage in product(SIZES, STAGES):
                source = place(root, size, saved_stage)
                (path,) = (source / "checkpoints").iterdir()
                trainer.clock, _ = trainer.checkpoints.restore(path, trainer.identity, trainer.engines, trainer.emas)
                assert trainer.clock.iteration == ITERATIONS
                expected, found = load_file(source / "expected.safetensors"), full_state(trainer)
                assert expected.keys() == found.keys()
                different = [k for k, v in expected.items() if not torch.equal(v, found[k])]
                assert not different, f"{source.name} at {workers.size} workers, ZeRO {stage}: {different}"
                compared += 1
        if workers.is_first:
            (root / f"compared-{workers.size}").write_text(str(compared))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_pair_of_sizes_and_stages(tmp_path: Path) -> None:
    for work, size in [*product([save_at_each_stage], SIZES), *product([restore_at_each_stage], SIZES)]:
        group = start_group(work, size, tmp_path / "log", tmp_path)
        assert wait_for_group(group, 120) == [0] * size, (tmp_path / "log").read_text()
    states = [load_file(place(tmp_path, w, s) / "expected.safetensors") for w, s in product(SIZES, STAGES)]
    key = "discriminator.exp_avg_sq.0.weight"
    assert all(state[key].abs().min() > 0 for state in states)
    assert len({tuple(state[key].flatten().tolist()) for state in states}) > 1  # not one state twelve times
    compared = [int((tmp_path / f"compared-{size}").read_text()) for size in SIZES]
    assert compared == [len(STAGES) * len(SIZES) * len(STAGES)] * len(SIZES)
