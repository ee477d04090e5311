"""One thread per process in all tests: the machine's cores belong to the tests that start workers."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.servers import FaultServer, S3Server, fault_server, s3_server

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
# The command line must print the same wherever it is tested.
os.environ["COLUMNS"] = "120"
os.environ["NO_COLOR"] = "1"

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")  # tests that do not need torch do not pay for its import
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture
def faulty() -> Iterator[FaultServer]:
    """An http server that breaks off as it is told."""
    with fault_server() as server:
        yield server


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """S3 on loopback, found by boto3 through the environment, also in processes that the test starts."""
    with s3_server() as server:
        yield server
