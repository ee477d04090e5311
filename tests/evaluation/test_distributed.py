"""One, two and three worker processes, joined by gloo, say the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluation.conftest import Info, MemoryData, ToySystem
from tests.training.forked import start_group, wait_for_group

from bessemer.evaluation import evaluate
from bessemer.evaluation.extractors import get_extractor
from bessemer.systems.contract import SystemConfig
from bessemer.training.distributed import join_workers

METRICS = ["kid_pixels", "recall_pixels", "fd_pixels", "fd_efflite0"]
SAMPLES = 150


class Means:
    """Means of thirds of the image: so few dimensions that sums are enough for a Frechet distance."""

    name, dimension, weights_sha256, preprocessing, head = "efflite0", 9, "0", "means", None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), (1, 3)).flatten(1)


def work(out: str) -> None:
    evaluate.get_extractor = lambda name, device: Means() if name == "efflite0" else get_extractor(name, device)
    images = np.random.default_rng(0).integers(0, 256, (120, 3, 16, 16), dtype=np.uint8)
    with join_workers() as workers:
        records = evaluate.evaluate_system(
            ToySystem(SystemConfig(resolution=16, channels=3, classes=3)),
            Info(),
            MemoryData(images),
            METRICS,
            samples=SAMPLES,
            batch_size=32,
            group=workers,
            cache_dir=Path(out).parent / f"cache-{workers.size}-{workers.rank}",
        )
        if workers.is_first:
            Path(out).write_text(json.dumps([replace(r, seconds=0.0).as_dict() for r in records]))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_any_number_of_processes_computes_the_same(tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 3):
        out = tmp_path / f"{size}.json"
        group = start_group(work, size, tmp_path / "log", str(out))
        assert wait_for_group(group, 120) == [0] * size, (tmp_path / "log").read_text()
        found.append(json.loads(out.read_text()))
    first = found[0]
    assert [r["metric"] for r in first] == METRICS
    assert {r["samples"] for r in first} == {SAMPLES}
    assert first[3]["value"] > 1
    for other in found[1:]:
        for a, b in zip(first, other, strict=True):
            assert b.pop("value") == pytest.approx(a["value"], rel=1e-9)
            assert b == {key: value for key, value in a.items() if key != "value"}
