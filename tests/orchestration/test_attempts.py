"""Attempts: room is waited for but not for ever, and an error of the code ends a run with its traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bessemer
from bessemer.data.packing.pack import pack
from bessemer.orchestration.failures import Failure, clear_failures, leave_failure, read_failure
from bessemer.orchestration.group import environments
from bessemer.tracking.journal import read_journal

JOB = """
name: attempts
system: {name: broken, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.64, batch_size: 16, slice_size: 8, log_every_kimg: 0.016}
checkpoint: {every_kimg: 0.016}
evaluation: {metrics: [], grid: 2}
tracking: {mlflow: false}
resources: {workers: 2, cpus_per_worker: 0.5}
"""
BROKEN = '''
import os
from bessemer.systems.adversarial.biggan import BigGAN

class Broken(BigGAN):
    """A system with a mistake that one worker meets, always at the same point."""

    name = "broken"

    def after_iteration(self, clock):
        super().after_iteration(clock)
        if clock.nimg >= 64 and os.environ["RANK"] == "1":
            self.no_such_thing(clock)
'''


# What failures say.


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as e:
        return e


def test_the_worker_whose_code_failed_is_the_cause(tmp_path: Path) -> None:
    """The others only see that a connection is gone; the last to see it comes first by rank."""
    import torch.distributed as dist

    leave_failure(tmp_path, 0, raised(dist.DistBackendError("NCCL communicator was aborted")))
    leave_failure(tmp_path, 2, raised(KeyError("latent")))
    failure = read_failure(tmp_path, {})
    assert failure.worker == 2
    assert failure.line == "worker 2: KeyError: 'latent'"
    assert 'raised(KeyError("latent"))' not in failure.traceback.splitlines()[0]
    assert "KeyError: 'latent'" in failure.traceback
    assert failure.is_same_as(read_failure(tmp_path, {}))
    clear_failures(tmp_path)
    leave_failure(tmp_path, 2, raised(ValueError("latent")))
    assert not failure.is_same_as(read_failure(tmp_path, {}))


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.11]:33821"


@pytest.mark.parametrize(
    ("error", "noticed"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2309, unhandled system error"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed"), False),
        (FileNotFoundError(2, "No such file or directory", "/data/x"), False),
    ],
)
def test_who_only_noticed_that_another_is_gone(tmp_path: Path, error: Exception, noticed: bool) -> None:
    leave_failure(tmp_path, 1, raised(error))
    assert (read_failure(tmp_path, {}).worker is None) == noticed


def test_lost_workers_are_nobody_s_mistake(tmp_path: Path) -> None:
    """Twice the same loss is no deterministic error: it may be tried again."""
    died = RuntimeError("The actor died unexpectedly\nbecause of this and that")
    failure = read_failure(tmp_path, {1: died})
    assert failure == Failure({"1": "The actor died unexpectedly"})
    assert not failure.is_same_as(failure)


def test_workers_know_their_place_as_under_torchrun() -> None:
    found = environments(["a", "a", "b"], [["3"], ["1"], ["0"]], "10.0.0.1", 29500)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    assert [[worker[name] for name in names] for worker in found] == [
        ["0", "3", "0", "2", "3,1"],
        ["1", "3", "1", "2", "3,1"],
        ["2", "3", "0", "1", "0"],
    ]
    assert {(worker["MASTER_ADDR"], worker["MASTER_PORT"]) for worker in found} == {("10.0.0.1", "29500")}


# With a real Ray.


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attempts")
    pack("digits", root / "digits", size=32, mode="RGB", limit=10)
    path = root / "job.yaml"
    path.write_text(JOB.replace("DATA", str(root / "digits")))
    return path


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("work", ["room", "gpu"])
def test_a_group_takes_what_others_leave(job: Path, work: str) -> None:
    command = [sys.executable, "-m", f"tests.orchestration.{work}_work", str(job)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith(f"{work} ok\n"), done.stderr


ASKS = """
import torch.cuda
asked = []
for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, lambda *_, name=name, **__: asked.append(name))
import bessemer.orchestration.worker
print("asked", *asked)
"""


def test_the_imports_of_a_spare_process_do_not_ask_cuda() -> None:
    """A process that has asked keeps the devices that it saw, and its own are not known yet."""
    done = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "asked\n", done.stdout + done.stderr


@pytest.mark.multiprocess
@pytest.mark.slow
def test_an_error_of_the_code_ends_the_run_with_its_traceback(job: Path, tmp_path: Path) -> None:
    """A package with a broken system: the run stops after the second time, long before max_failures."""
    package = tmp_path / "package" / "bessemer"
    shutil.copytree(Path(bessemer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "systems" / "adversarial" / "broken.py").write_text(BROKEN)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "bessemer.cli", "train", str(job), "--run-dir", str(run)]
    command += ["--set", "resources.max_failures=50"]
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 2, done.stderr
    assert "the same error ended the workers twice without progress: worker 1: AttributeError: " in done.stderr
    assert "self.no_such_thing(clock)" in done.stderr, "the traceback is missing"
    records = read_journal(run / "journal.jsonl")
    assert [r["event"] for r in records if r.get("event") in ("workers_lost", "failed")] == [
        "workers_lost",
        "workers_lost",
        "failed",
    ]
    assert "no_such_thing" in (run / "logs" / "worker-1.log").read_text()
