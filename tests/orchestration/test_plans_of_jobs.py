"""The largest jobs of each flagship fit the GPUs that they are written for."""

from pathlib import Path

import pytest

from bessemer.orchestration.planning import plan_job
from bessemer.spec.load import load_job
from bessemer.training.plan import target

JOBS = Path(__file__).resolve().parents[2] / "jobs"


@pytest.mark.slow
@pytest.mark.configuration
@pytest.mark.parametrize("stem", ["biggan-deep-imagenet512", "stylegan2-ffhq1024"])
def test_planned(stem: str) -> None:
    job = load_job(JOBS / f"{stem}.yaml")
    found, _ = plan_job(job, target("a100", job))
    assert found.memory is not None
    assert found.total < 0.9 * found.memory
    assert 1 < found.hours < 1000


@pytest.mark.slow
@pytest.mark.configuration
@pytest.mark.parametrize(
    ("stem", "changes", "published"),
    [
        ("nvae-cifar10", ["training.precision=fp16"], 55),
        ("stylegan2-ffhq256", ["training.precision=fp16"], 25_000 * 4.01 / 3600),
        (
            "biggan-imagenet128",
            ["training.precision=fp32", "system.config.d_steps=1", "training.total_kimg=307200"],
            15 * 24,
        ),
    ],
)
def test_published_runs_took_as_long_as_planned(stem: str, changes: list[str], published: float) -> None:
    """On eight V100: within a factor of two, but for NVAE, which in 2020 was far from what its GPUs can do."""
    job = load_job(JOBS / f"{stem}.yaml", changes)
    found, _ = plan_job(job, target("v100", job))
    assert 0.5 < published / found.hours < (12 if stem == "nvae-cifar10" else 2)
