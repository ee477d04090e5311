"""The cluster that tests break, and what they train on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.breaking import BREAKING_JOB
from tests.cluster.netns import Hosts, network_hosts
from tests.orchestration.processes import digits_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of three workers."""
    return digits_job(tmp_path_factory.mktemp("breaking"), BREAKING_JOB)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head, two workers and an object store."""
    with network_hosts("--store") as made:
        yield made
