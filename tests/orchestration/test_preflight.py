"""What is refused before anything starts, with the field, the value, the rule and the fix."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.servers import S3Server

from bessemer.cli.app import run
from bessemer.data.packing.pack import pack
from bessemer.errors import BessemerError, MachineError, RunError
from bessemer.orchestration.launch import launch
from bessemer.orchestration.preflight import preflight, with_absolute_paths
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.load import load_job

JOB = """
name: small
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.1, batch_size: 16, slice_size: 8, log_every_kimg: 0.05}
evaluation: {metrics: [], grid: 2}
tracking: {mlflow: false}
resources: {workers: 1}
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    pack("digits", root / "digits", size=32, mode="RGB", limit=5)
    pack("digits", root / "digits16", size=16, mode="RGB", limit=5)
    path = root / "job.yaml"
    path.write_text(JOB.replace("DATA", str(root / "digits")))
    return path


def test_a_good_job_passes(job: Path, tmp_path: Path) -> None:
    preflight(load_job(job), tmp_path)


def test_runs_that_cannot_be_written_are_refused_first(job: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file" / "runs", Path("/proc/runs")):
        with pytest.raises(RunError, match=r"run directory .*cannot be written \(.*--runs or --run-dir"):
            preflight(load_job(job), root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=nowhere", "bessemer data pack"),
        ("data.path=ROOT/digits16", r"resolution.*expects 32.*has 16.*--size 32"),
        ("system.name=bigga", r"system\.name.*'bigga'.*Did you mean 'biggan'"),
        ("system.preset=tiny", r"system\.preset.*'tiny'.*tiny32"),
        ("system.config.latent_dims=3", r"system\.config\.latent_dims.*latent_dim"),
        ("system.config.latent_dim=81", r"latent_dim 81 must be a multiple"),
        ("system.config.resolution=33", r"system\.config\.resolution"),
        ("training.batch_size=64", r"training\.batch_size: 64 is more than the 50 images"),
        ("training.optimizers.critic.lr=1", r"training\.optimizers\.critic.*generator, discriminator"),
        ("training.zero_stage=3", r"training\.zero_stage: 3 .*2 or lower"),
        ("evaluation.metrics=[kid_eflite0]", "kid_efflite0"),
        ("evaluation.metrics=[psnr]", "psnr: compares translations with their targets, and biggan has none"),
        ("evaluation.held_out=ROOT/digits", r"held_out: \S+ has no effect while .* and biggan translates nothing"),
        ("resources.cpus_per_worker=4096", r"resources: 1 workers with 4096 CPUs.*lower"),
        (
            "evaluation.beside=true,resources.evaluator_cpus=999",
            r"an evaluator with 999 .*evaluation\.beside to false",
        ),
        (
            "resources.address=127.0.0.1:1",
            r"address or RAY_ADDRESS: nothing answers at 127\.0\.0\.1:1 \(.*refused",
        ),
        ("resources.address=head", r"resources\.address or RAY_ADDRESS: 'head' is no address.*HOST:PORT"),
        ("resources.address=head:99999", r"resources\.address or RAY_ADDRESS: 'head:99999' is no address"),
        ("resources.gpus_per_worker=1,resources.workers=2", r"resources: 2 workers with 1 GPUs.*0 trains on the CPU"),
    ],
)
def test_refusals(job: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(BessemerError, match=message):
        preflight(load_job(job, change.replace("ROOT", str(job.parent)).split(",")), tmp_path)


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_joining_a_cluster_is_said(
    job: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RAY_ADDRESS may have been set long ago, in another file."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    data = ["digits", "--datasets", str(job.parent), "--job"] if command == "quickstart" else []
    monkeypatch.setattr(sys, "argv", ["bessemer", command, *data, str(job), "--runs", str(tmp_path)])
    with pytest.raises(SystemExit):
        run()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "joins the Ray cluster at 127.0.0.1:1 (RAY_ADDRESS); unset it to train on this machine alone"
    assert "nothing answers at 127.0.0.1:1" in said[-1]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_who_listens_but_is_no_ray_is_named_at_once(
    job: Path, tmp_path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, Ray's client waits for minutes for a server that accepts connections and says nothing."""
    monkeypatch.setattr("bessemer.orchestration.preflight._ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"

        def reply() -> None:
            with server.accept()[0] as connection:
                connection.sendall(answer)

        if answer:
            threading.Thread(target=reply, daemon=True).start()
        with pytest.raises(MachineError, match=rf"something listens at {place}, but it is no Ray cluster; give"):
            preflight(load_job(job, [f"resources.address={place}"]), tmp_path)


def test_a_store_that_cannot_be_written_is_refused(job: Path, tmp_path: Path, s3: S3Server) -> None:
    (tmp_path / "file").write_text("")
    for url, message in (
        (tmp_path / "file", r"checkpoint\.upload: .*/file/probe-\w+: cannot be written"),
        ("s3://nowhere/runs", r"checkpoint\.upload: s3://nowhere/.*NoSuchBucket.*create the bucket"),
        ("nonsense://x", r"checkpoint\.upload: nonsense://x: Protocol not known"),
    ):
        with pytest.raises(BessemerError, match=message):
            preflight(load_job(job, [f"checkpoint.upload={url}"]), tmp_path)
    for url in (f"{s3.url}/runs", tmp_path / "store"):
        preflight(load_job(job, [f"checkpoint.upload={url}"]), tmp_path)
    assert "Contents" not in s3.client().list_objects_v2(Bucket=s3.bucket)
    assert not list((tmp_path / "store").iterdir())


def test_a_job_that_memory_cannot_hold_is_refused(job: Path, tmp_path: Path) -> None:
    """Nobody has the memory for this generator: 10,000 times the channels, 10^8 times the weights."""
    wide = ["system.config.generator_width=160000", "training.zero_stage=2"]
    with pytest.raises(MachineError, match=r"memory: a worker needs .* GiB, and the CPU has .*Set resources.workers"):
        preflight(load_job(job, wide), tmp_path)


def test_zero_3_names_the_second_order_loss(job: Path, tmp_path: Path) -> None:
    changed = load_job(job, ["training.zero_stage=3", "system.config.r1_gamma=1"])
    with pytest.raises(BessemerError, match=r"zero_stage: 3 computes wrong gradients for second-order.*r1.*set.*2"):
        preflight(changed, tmp_path)


def test_an_unwritable_place_is_named(job: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(BessemerError, match=r"cannot be written .*--runs"):
            RunDirectory.create(root, load_job(job))


def test_an_existing_run_is_not_overwritten(job: Path, tmp_path: Path) -> None:
    spec = load_job(job)
    first = RunDirectory.create(tmp_path, spec)
    assert RunDirectory.create(tmp_path, spec).path.name == "small-2"
    with pytest.raises(BessemerError, match=r"exists already.*bessemer resume"):
        RunDirectory.create(tmp_path, spec, first.path)


def test_two_trainers_of_one_run(job: Path, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, load_job(job))
    with run.locked(), pytest.raises(BessemerError, match=f"trained by process {os.getpid()}"):
        launch(run)
    with run.locked():
        pass  # the lock is free again


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(BessemerError, match="is no run directory"):
        RunDirectory.open(tmp_path)


def test_the_run_keeps_its_job(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job.parent)
    spec = with_absolute_paths(load_job(job, ["data.path=digits", "checkpoint.upload=up", "training.total_kimg=0.2"]))
    run = RunDirectory.create(tmp_path, spec)
    assert run.job() == spec
    assert run.job().data.path == str(job.parent / "digits")
    assert run.job().checkpoint.upload == str(job.parent / "up")


def test_only_the_first_error_is_kept(job: Path, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, load_job(job))
    assert run.error() is None
    run.leave_error(ValueError("first"))
    run.leave_error(ValueError("second"))
    assert run.error() == {"type": "ValueError", "message": "first"}
    run.clear_error()
    assert run.error() is None


def worker(job: Path, run: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bessemer.orchestration.worker", str(job), "--run-dir", str(run), *more]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **env}
    )


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_taken_port_is_named(job: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        done = worker(job, tmp_path / "run", **env)
    assert done.returncode != 0
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.multiprocess
@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_run(job: Path, tmp_path: Path) -> None:
    done = worker(job, tmp_path / "run", "--set", "training.optimizers.discriminator.lr=1e30")
    assert done.returncode != 0
    assert done.stderr.count("error: stopped at") == 1
    assert re.search(
        r"loss/\w+ was (nan|inf|-inf).* on worker 0, 4 times in a row \(guards\.max_skips: 3\)", done.stderr
    )
    assert re.search(r"Lower training\.optimizers\.\w+\.lr", done.stderr)
    error = RunDirectory.open(tmp_path / "run").error()
    assert error is not None
    assert error["type"] == "TrainingError"


def test_a_data_set_of_another_kind_is_refused(job: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "bits.npy", np.eye(32, dtype=np.uint8))
    pack(tmp_path / "bits.npy", tmp_path / "bits", kind="bits")
    with pytest.raises(
        BessemerError, match=r"data\.path: .*bits has bits \[32\], but biggan takes images \[3, 32, 32\]"
    ):
        preflight(load_job(job, [f"data.path={tmp_path / 'bits'}"]), tmp_path / "runs")
