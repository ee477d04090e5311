"""What the server of forked workers imports before it forks: all that a worker would import itself, early or late."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.runtime.zero.muon.muon_optimizer  # its @torch.compile pulls in all of inductor
import tests.training.scripts.tiny_run
from deepspeed.ops.op_builder import all_ops

__all__ = ["all_ops", "deepspeed", "tests"]
