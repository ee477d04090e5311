from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

WriteTree = Callable[..., Path]


@pytest.fixture
def source(write_tree: WriteTree, tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", classes=2, per_class=4)
