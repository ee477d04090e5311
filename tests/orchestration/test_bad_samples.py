"""A worker that meets a damaged sample and replaces it says so in the journal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.tracking.journal import read_journal

JOB = """
name: small
system: {name: biggan, preset: tiny32}
data: {path: DATA, on_bad_sample: quarantine, threads: 0}
training: {total_kimg: 0.064, batch_size: 16, slice_size: 8, log_every_kimg: 0.016}
evaluation: {metrics: [], grid: 2}
tracking: {mlflow: false}
resources: {workers: 1}
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_replaced_sample_is_an_event_and_is_counted(tmp_path: Path) -> None:
    data = tmp_path / "set"
    pack("digits", data, size=32, mode="RGB", limit=3)  # every epoch, and the run has two, reads all 30
    with ShardedDataset.open(data) as dataset:
        offset, length = int(dataset._offsets[7, 0]), int(dataset._lengths[7, 0])
        shard = data / dataset.manifest.shards[0].name
    content = bytearray(shard.read_bytes())
    content[offset + length // 2] ^= 0xFF
    shard.write_bytes(content)
    (tmp_path / "job.yaml").write_text(JOB.replace("DATA", str(data)))
    command = [sys.executable, "-m", "bessemer.orchestration.worker", str(tmp_path / "job.yaml")]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    records = list(read_journal(RunDirectory.open(tmp_path / "run").journal.path))
    (event,) = [record for record in records if record.get("event") == "bad_sample"]
    assert (event["number"], event["shard"], event["offset"], event["worker"]) == (7, shard.name, offset, 0)
    assert "crc32" in event["reason"]
    counts = [record["values"]["data/bad_samples"] for record in records if record["kind"] == "metrics"]
    assert counts == sorted(counts)
    assert counts[-1] == 1
    assert np.isfinite(counts).all()
