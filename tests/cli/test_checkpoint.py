"""The checkpoints of a real run: listed, verified, exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.data.packing.pack import pack
from bessemer.errors import RunError
from bessemer.orchestration.elsewhere import fetch_run
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.systems.snapshot import load_snapshot
from bessemer.tracking.journal import read_journal
from bessemer.training.checkpoint_files import complete_checkpoints

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

JOB = """
name: few
system: {name: biggan, preset: tiny32}
data: {path: DATA}
training: {total_kimg: 0.064, batch_size: 16, slice_size: 8, zero_stage: 1}
ema: {batch_norm: recomputed}
checkpoint: {every_kimg: 0.032, upload: STORE}
evaluation: {metrics: [], every_kimg: 0.032, grid: 2}
tracking: {mlflow: false}
"""
FIRST, LAST = "kimg-000000.032", "kimg-000000.064"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    pack("digits", root / "digits", size=32, mode="RGB", limit=20)
    (root / "job.yaml").write_text(JOB.replace("DATA", str(root / "digits")).replace("STORE", f"file://{root}/store"))
    start(root)
    return root / "run"


def start(root: Path) -> None:
    command = [sys.executable, "-m", "bessemer.orchestration.worker", str(root / "job.yaml"), "--run-dir"]
    done = subprocess.run(
        [*command, str(root / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def bessemer(*words: object) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, [str(word) for word in ("checkpoint", *words)])
    return result.exit_code, result.output, result.exception


def truncate(run: Path, name: str, file: str) -> Path:
    path = run / "checkpoints" / name / file
    os.truncate(path, path.stat().st_size - 1)
    return path


def test_ls_says_what_is_there(run: Path) -> None:
    truncate(run, LAST, "rank-00000.safetensors")
    code, output, _ = bessemer("ls", run)
    lines = [line.split() for line in output.splitlines()]
    assert code == 0
    assert [(line[0], line[1], line[-1]) for line in lines[1:]] == [
        (FIRST, "0.032", "complete"),
        (LAST, "0.064", "damaged"),
    ]
    first, last = json.loads(bessemer("ls", run, "--json")[1])
    size = sum(p.stat().st_size for p in (run / "checkpoints" / FIRST).iterdir())
    assert first == {"name": FIRST, "kimg": 0.032, "bytes": size, "workers": 1, "zero_stage": 1, "damage": None}
    assert "rank-00000.safetensors" in last["damage"]


def test_verify_names_what_is_damaged_and_says_no(run: Path) -> None:
    assert bessemer("verify", run)[:2] == (0, f"{FIRST}  ok\n{LAST}  ok\n")
    path = run / "checkpoints" / FIRST / "shared.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [row["damage"] for row in json.loads(bessemer("ls", run, "--json")[1])] == [None, None]  # sizes are right
    code, output, _ = bessemer("verify", run)
    assert code == 1
    assert output == f"{FIRST}  {path}: sha256 differs from the manifest.\n{LAST}  ok\n"
    assert bessemer("verify", run, "--json")[0] == 1


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_a_checkpoint_without_its_description_is_listed(run: Path, file: str) -> None:
    (run / "checkpoints" / LAST / file).unlink()
    code, output, _ = bessemer("verify", run)
    assert code == 1
    assert f"{LAST}/{file}" in output


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_an_export_is_the_snapshot_of_that_moment(run: Path, tmp_path: Path, name: str) -> None:
    """The evaluation wrote a snapshot at the same moment, from the workers' memory: the bytes must be the same."""
    out = tmp_path / "out"
    code, output, error = bessemer("export", run, "--out", out, "--checkpoint", name)
    assert code == 0, error
    assert output == f"{out}: biggan at {float(name[5:]):g} kimg\n"
    for file in ("weights.safetensors", "snapshot.json"):
        assert (out / file).read_bytes() == (run / "snapshots" / name / file).read_bytes()
    load_snapshot(out)


def test_an_export_takes_the_newest_that_is_whole_and_finds_the_classes_in_the_data(run: Path, tmp_path: Path) -> None:
    expected = (run / "snapshots" / FIRST / "snapshot.json").read_bytes()
    truncate(run, LAST, "rank-00000.safetensors")
    shutil.rmtree(run / "snapshots")
    assert bessemer("export", run, "--out", tmp_path / "out", "--json")[0] == 0
    assert (tmp_path / "out" / "snapshot.json").read_bytes() == expected
    for words, message in (
        (["--out", tmp_path / "out"], "exists already"),
        (["--out", tmp_path / "o", "--checkpoint", LAST], "bytes, the manifest says"),
        (["--out", tmp_path / "o", "--checkpoint", "kimg-9"], f"no such checkpoint; it has {FIRST}, {LAST}"),
    ):
        assert message in str(bessemer("export", run, *words)[2])
    assert not (tmp_path / "o").exists()
    assert len(complete_checkpoints(run / "checkpoints")) == 2


def test_an_export_to_onnx_names_the_weights_of_the_snapshot(run: Path, tmp_path: Path) -> None:
    onnx, out = pytest.importorskip("onnx"), tmp_path / "sampler.onnx"
    code, output, error = bessemer("export", run, "--out", out, "--checkpoint", FIRST, "--format", "onnx")
    assert code == 0, error
    assert output == f"{out}: biggan at 0.032 kimg\n"
    written = {p.key: p.value for p in onnx.load(out).metadata_props}
    snapshot = json.loads((run / "snapshots" / FIRST / "snapshot.json").read_text())
    assert written["bessemer.weights_sha256"] == snapshot["weights_sha256"]
    assert "add --format onnx" in str(bessemer("export", run, "--out", tmp_path / "o", "--truncation", "0.5")[2])


def test_the_uploads_of_a_run_are_listed_and_verified(trained: Path) -> None:
    store = trained.parent / "store" / "run"
    here, there = (json.loads(bessemer("ls", place, "--json")[1]) for place in (trained, f"file://{store}"))
    assert there == here
    assert bessemer("verify", f"file://{store}")[:2] == (0, f"{FIRST}  ok\n{LAST}  ok\n")
    path = store / "checkpoints" / FIRST / "shared.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        code, output, _ = bessemer("verify", f"file://{store}")
        assert code == 1
        assert output == f"{FIRST}  file://{path}: sha256 differs from the manifest.\n{LAST}  ok\n"
    finally:
        path.write_bytes(data)


def test_a_run_that_is_lost_goes_on_from_its_uploads(trained: Path, tmp_path: Path) -> None:
    store = trained.parent / "store"
    shutil.copytree(store, tmp_path / "store")
    for name in ("job.yaml", "digits"):
        (tmp_path / name).symlink_to(trained.parent / name)
    job = (trained.parent / "job.yaml").read_text().replace(str(store), str(tmp_path / "store"))
    (tmp_path / "job.yaml").unlink()
    (tmp_path / "job.yaml").write_text(job)
    start(tmp_path)  # a new directory of the run's name
    assert RunDirectory.open(tmp_path / "run").job().checkpoint.upload == f"file://{tmp_path}/store"
    records = read_journal(tmp_path / "run" / "journal.jsonl")
    assert [r["checkpoint"] for r in records if r.get("event") == "resumed"] == [LAST]
    assert [r["nimg"] for r in records if r["kind"] == "samples"] == [0, 32, 64]  # also from before it was lost
    for name in ("rank-00000.safetensors", "manifest.json"):
        places = [root / "checkpoints" / LAST / name for root in (trained, tmp_path / "run")]
        assert places[0].read_bytes() == places[1].read_bytes()

    run = fetch_run(f"file://{tmp_path}/store/run", tmp_path / "runs")
    assert run.path == tmp_path / "runs" / "run"
    assert run.record()["id"] == RunDirectory.open(trained).record()["id"]
    assert run.job().checkpoint.upload == f"file://{tmp_path}/store"  # it was moved since
    with pytest.raises(RunError, match="exists already; go on with it: bessemer resume"):
        fetch_run(f"file://{tmp_path}/store/run", tmp_path / "runs")
    with pytest.raises(RunError, match="store/other: is no run"):
        fetch_run(f"file://{tmp_path}/store/other", tmp_path / "runs")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]
