"""One thread per process in all tests: the machine's cores belong to the tests that start workers."""

import os
import sys

import pytest
from hypothesis import settings

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
