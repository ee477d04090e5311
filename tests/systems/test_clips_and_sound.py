"""Clips and sound from files to numbers: made, packed, trained on, drawn and evaluated, by the commands of people."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.tracking.journal import read_journal

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "small_sets.py"
JOBS = {
    "clips": """
system: {name: dvdgan, preset: tiny16, config: {generator_width: 2, discriminator_width: 2}}
evaluation: {metrics: [fdframes_pixels, fdsteps_pixels], samples: 8, grid: 2, every_kimg: 0.032}
""",
    "audio": """
system: {name: wavenet, preset: tiny, config: {blocks: 1, layers: 4, width: 4, gate_width: 4, skip_width: 8}}
evaluation: {metrics: [bits_per_dim], samples: 8, grid: 2, every_kimg: 0.032}
""",
}
COMMON = """
name: small
data: {path: DATA, threads: 0}
training: {total_kimg: 0.032, batch_size: 8, slice_size: 8, log_every_kimg: 0.016}
tracking: {mlflow: false}
resources: {workers: 1}
"""


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_digits_move_by_one_or_two_pixels_and_stay_whole(script: dict[str, Any]) -> None:
    digit = np.random.default_rng(0).integers(1, 256, (8, 8)).astype(np.uint8)
    for seed in range(20):
        clip = script["moving"](digit, np.random.default_rng(seed))
        assert clip.shape == (8, 16, 16)
        corners = []
        for frame in clip:
            y, x = (int(np.flatnonzero(frame.any(axis))[0]) for axis in (1, 0))
            assert np.array_equal(frame[y : y + 8, x : x + 8], digit)
            assert np.count_nonzero(frame) == 64
            corners.append((y, x))
        steps = np.abs(np.diff(corners, axis=0))
        assert steps.max() <= 2
        assert steps.any(axis=1).mean() > 0.8


def test_strings_sound_at_their_pitch(script: dict[str, Any]) -> None:
    for frequency in (130.81, 246.94, 392.0):
        sound = script["pluck"](frequency, np.random.default_rng(0)).astype(float)
        power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        at = np.arange(len(power)) * 4000 / len(sound)
        overtones = np.abs(at / frequency - (at / frequency).round()) * frequency < 16
        assert power[overtones & (at > 100)].sum() > 0.9 * power[at > 20].sum()
        assert np.abs(sound[:512]).mean() > 1.5 * np.abs(sound[-512:]).mean()


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("kind", list(JOBS))
def test_from_files_to_numbers(kind: str, script: dict[str, Any], tmp_path: Path) -> None:
    source, data, run = tmp_path / ("clips.npz" if kind == "clips" else "sounds"), tmp_path / "data", tmp_path / "run"
    if kind == "clips":
        script["write_digits"](source, 1)
        invoke("data", "pack", source, data, "--kind", "clips", "--limit", 2)
    else:
        script["write_strings"](source, 2)
        invoke("data", "pack", source, data)
    job = tmp_path / "job.yaml"
    job.write_text(COMMON.replace("DATA", str(data)) + JOBS[kind])
    command = [sys.executable, "-m", "bessemer.orchestration.worker", str(job), "--run-dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    records = list(read_journal(run / "journal.jsonl"))
    found = {(r["nimg"], r["metric"]): r for r in records if r["kind"] == "evaluation"}
    metrics = ["bits_per_dim"] if kind == "audio" else ["fdframes_pixels", "fdsteps_pixels"]
    assert set(found) == {(nimg, metric) for nimg in (0, 32) for metric in metrics}
    plays = ".wav" if kind == "audio" else ".gif"
    for name in ("real", "kimg-000000.032"):
        assert (run / "samples" / f"{name}.png").is_file()
        assert (run / "samples" / f"{name}{plays}").is_file()

    out = tmp_path / "drawn" / "sheet.png"
    facts = json.loads(invoke("sample", run, "--out", out, "--rows", 2, "--device", "cpu", "--json"))
    assert facts["files"] == [str(out), str(out.with_suffix(plays))]
    if kind == "clips":
        with Image.open(out) as picture, Image.open(out.with_suffix(".gif")) as animation:
            assert (picture.size, animation.size) == ((8 * 16, 2 * 16), (2 * 16, 16))
    else:
        with wave.open(str(out.with_suffix(".wav"))) as sound:
            assert (sound.getframerate(), sound.getnframes()) == (4000, 2 * (2048 + 1000))
    again = json.loads(invoke("evaluate", run, "--device", "cpu", "--json"))
    for record in again:
        kept = found[32, record["metric"]]
        assert record["value"] == pytest.approx(kept["value"], rel=1e-6)
        assert record["weights_sha256"] == kept["weights_sha256"]
