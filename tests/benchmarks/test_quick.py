"""Every benchmark runs to its end and writes what it found. Whether goals are met is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(p for p in (Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py") if p.stem[0] != "_")

pytestmark = [pytest.mark.configuration]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_quick(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, path, "--quick", "--out", out], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(out.read_text())
    assert record["quick"] is True
    assert record["raw"]
    printed = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in printed] == [found["name"] for found in record["ratios"]]
    assert (done.returncode == 0) == all(words[3] == "ok" for words in printed)
