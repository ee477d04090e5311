"""A run directory with a journal such as the trainer writes, made in milliseconds."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

from bessemer.tracking.journal import Journal
from bessemer.tracking.mlflow_store import quiet_mlflow

JOB = """\
name: quickstart
seed: 0
system: {name: biggan, preset: cifar10-ch16, config: {}}
data: {path: /data/digits}
training: {total_kimg: 40.0, batch_size: 64, slice_size: 16}
evaluation: {metrics: [kid_efflite0, fd_efflite0], samples: 500}
tracking: {mlflow: true, uri: "sqlite:///mlflow.db", experiment: tests}
resources: {workers: 2}
"""


def png(grey: int, side: int = 4) -> bytes:
    """A sound PNG of one shade of grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([grey]) * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class RunMaker:
    """Writes a run directory piece by piece."""

    png = staticmethod(png)
    protocol: dict[str, Any] = {  # noqa: RUF012
        "samples": 500,
        "reference_samples": 500,
        "reference_hash": "abc",
        "extractor": "efflite0",
        "extractor_sha256": "def",
        "preprocessing": "p1",
        "seed": 0,
        "truncation": None,
        "weights": "ema",
    }

    def __init__(self, path: Path, **info: Any) -> None:
        self.path = path
        (path / "samples").mkdir(parents=True)
        (path / "job.yaml").write_text(JOB)
        record = {
            "id": f"id-{path.name}",
            "name": path.name,
            "created": 1.75e9,
            "git_sha": "0123abc",
            "bessemer": "0.1",
        }
        (path / "run.json").write_text(json.dumps(record | info))
        self.journal = Journal(path / "journal.jsonl")

    def event(self, name: str, nimg: int, **fields: Any) -> None:
        self.journal.write("event", nimg, event=name, **fields)

    def metrics(self, *points: int) -> None:
        for nimg in points:
            values = {"loss/generator": 1.0 / (nimg + 1), "loss/discriminator": 2.0, "throughput/img_per_s": 100.0}
            self.journal.write("metrics", nimg, values=values)

    def evaluate(self, nimg: int, kid: float, **protocol: Any) -> None:
        self.journal.write(
            "evaluation",
            nimg,
            **(
                {"metric": "kid_efflite0", "value": kid, "standard_error": 0.01, "seconds": 2.5}
                | self.protocol
                | protocol
            ),
        )

    def grid(self, nimg: int) -> None:
        relative = f"samples/kimg-{nimg / 1000:010.3f}.png"
        (self.path / relative).write_bytes(png(nimg // 1000 % 256))
        self.journal.write("samples", nimg, path=relative)

    def train(self, begin: int, end: int) -> None:
        """Metrics at each kimg, evaluation and grid at each tenth."""
        for nimg in range(begin + 1000, end + 1, 1000):
            self.metrics(nimg)
            if nimg % 10_000 == 0:
                self.evaluate(nimg, 0.5 - nimg / 100_000)
                self.grid(nimg)

    def whole(self) -> RunMaker:
        """A run that lost a worker at 15 kimg, went back to 10 and ended at 40."""
        self.event("started", 0, workers=2)
        self.evaluate(0, 0.5)
        self.grid(0)
        self.train(0, 15_000)
        self.event("worker_lost", 15_000)
        self.event("resumed", 10_000, checkpoint="kimg-000010.000", workers=2)
        self.train(10_000, 40_000)
        (self.path / "samples" / "real.png").write_bytes(png(255))
        self.event("finished", 40_000, workers=2)
        return self


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows that are kept between looks at a store are kept by each test for itself."""
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def runs_root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    root.mkdir()
    return root


@pytest.fixture
def make_run(runs_root: Path) -> Any:
    def make(name: str = "quickstart", **info: Any) -> RunMaker:
        return RunMaker(runs_root / name, **info)

    return make


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them takes seconds, copying them none."""
    quiet_mlflow()
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(runs_root: Path, empty_database: Path) -> Path:
    return Path(shutil.copy(empty_database, runs_root / "mlflow.db"))
