"""Importing clean-fid where torchvision's compiled operators do not load.

PyPI's torchvision is linked against CUDA. Beside a CPU-only torch its operators are missing, and importing it dies
with "operator torchvision::nms does not exist" while it registers their meta functions. clean-fid needs torchvision
for transforms only, so it is enough that these two operators are declared before the import.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from bessemer.errors import EvaluationError

__all__ = ["import_cleanfid"]

_declared: list[Any] = []  # a Library's operators live as long as it does


def import_cleanfid(module: str) -> ModuleType:
    """Import `cleanfid.<module>`.

    Raises:
        EvaluationError: clean-fid or torchvision is not installed.
    """
    try:
        _import_torchvision()
        return importlib.import_module(f"cleanfid.{module}")
    except ImportError as e:
        raise EvaluationError(
            f"metric fid: package {e.name} is missing; install it with: pip install 'bessemer[evaluation]'"
        ) from None


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::" not in str(e):
            raise
        import torch

        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
