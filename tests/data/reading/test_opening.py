import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tests.servers import FaultServer

from bessemer.data.reading.opening import load_job_manifest, open_job_data
from bessemer.errors import DataError, StoreError
from bessemer.orchestration.preflight import with_absolute_paths
from bessemer.spec.job import DataSpec, JobSpec

Truth = tuple[np.ndarray, np.ndarray]


def spec(path: str | Path, tmp_path: Path, **fields: object) -> DataSpec:
    return DataSpec.model_validate({"path": str(path), "cache_dir": str(tmp_path / "cache"), **fields})


def job(**data: object) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "a",
            "system": {"name": "biggan", "preset": "tiny32"},
            "data": data,
            "training": {"total_kimg": 1, "batch_size": 32, "slice_size": 16},
        }
    )


def test_directories_urls_and_commands_hold_the_same(
    packed: Path, tmp_path: Path, faulty: FaultServer, truth: Truth
) -> None:
    faulty.objects.update({f"my set/{path.name}": path.read_bytes() for path in packed.iterdir()})
    command = f"pipe:cat {shlex.quote(str(packed))}/{{name}}"
    for place in (packed, packed.as_uri(), f"{faulty.url}/my%20set", command):
        data = spec(place, tmp_path, allow_pipe=True)
        with open_job_data(data) as dataset:
            assert np.array_equal(dataset.read(np.arange(60)), truth[0])
            assert load_job_manifest(data) == dataset.manifest
    assert len(list((tmp_path / "cache").iterdir())) == len(dataset.manifest.shards) + 2  # index and lock


def test_pipe_is_refused_unless_the_job_allows_it(packed: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    command = f"pipe:touch {witness}; cat {packed}/{{name}}"
    with pytest.raises(ValidationError, match=r"data\.path: 'pipe:.* data\.allow_pipe to true"):
        job(path=command)
    with pytest.raises(StoreError, match="pipe: runs a shell command"):
        open_job_data(spec(command, tmp_path))  # who gets past the job's rules gets no further
    with pytest.raises(ValidationError, match=r"write \{name\} where"):
        job(path="pipe:cat x", allow_pipe=True)
    assert job(path=command, allow_pipe=True).data.path == command
    assert not witness.exists()


def test_a_command_that_fails_or_sends_something_else(packed: Path, tmp_path: Path) -> None:
    for command, message in (("false {name}", "ended with 1"), ("echo {name}", r"manifest\.json")):
        with pytest.raises((StoreError, DataError), match=message):
            open_job_data(spec(f"pipe:{command}", tmp_path, allow_pipe=True))


def test_no_data_set_at_a_url(tmp_path: Path, faulty: FaultServer) -> None:
    with pytest.raises(DataError, match=r"http://.*/nowhere has no manifest\.json, so it is no packed data set"):
        open_job_data(spec(f"{faulty.url}/nowhere", tmp_path))
    faulty.objects["set/manifest.json"] = json.dumps({"shards": ["../../etc/passwd"]}).encode()
    with pytest.raises(DataError, match=r"set/manifest\.json"):
        open_job_data(spec(f"{faulty.url}/set", tmp_path))


def test_only_paths_become_absolute() -> None:
    data = with_absolute_paths(job(path="s3://bucket/set", cache_dir="copies")).data
    assert data.path == "s3://bucket/set"
    assert data.cache_dir == str(Path("copies").absolute())
    assert with_absolute_paths(job(path="set")).data.path == str(Path("set").absolute())
