"""DeepSpeed is imported without what costs half of its time, and nothing of that is broken for whoever wants it."""

from __future__ import annotations

import subprocess
import sys

WORK = """
import sys
from bessemer.training.distributed import import_deepspeed
import_deepspeed("cpu")
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert get_accelerator().device_name() == "cpu"
assert compiler.compile.__module__ == "deepspeed.runtime.compiler", "it was not put back"
assert not {"mlflow", "torch._inductor.compile_fx"} & set(sys.modules)
import mlflow
assert mlflow.start_run
"""


def test_mlflow_and_the_compiler_stay_away() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
