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
