"""The machinery of the benchmarks: turns, ratios, what is printed and written."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_common", ROOT / "benchmarks" / "_common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_common"] = module
    spec.loader.exec_module(module)
    return module


def test_sides_take_turns_and_swap_places(common: ModuleType) -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    numbers = common.alternate({"a": lambda: side("a"), "b": lambda: side("b")}, 3, warm_up=1)
    assert "".join(order) == "abbaabba"
    assert numbers == {"a": [4, 5, 8], "b": [3, 6, 7]}


def test_ratios_are_of_neighbours(common: ModuleType) -> None:
    # A machine that gets three times slower meanwhile does not change what one side costs of the other.
    found = common.ratio("step", [2.0, 4.0, 6.0], [1.0, 2.0, 3.0], goal=2.0)
    assert found.value == 2
    assert found.spread == 0
    assert found.ok
    assert str(found) == "step 2 2 ok"
    assert str(common.ratio("step", [2.1], [1.0], goal=2.0)) == "step 2.1 2 short"
    assert common.ratio("step", [9.0], [1.0]).ok


def test_spread_is_a_share_of_the_median(common: ModuleType) -> None:
    assert common.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4.5 - 1.5) / 3)
    assert common.spread([1.0]) == 0


def test_the_interval_of_a_ratio_holds_it_as_often_as_it_says(common: ModuleType) -> None:
    """Rounds of two equal sides whose ratio has the median 1.01 and a noise of a tenth."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        noise = random.normal(0, 0.1, 40)
        low, high = common.interval([1.01 * math.exp(each) for each in noise], draws=400)
        held += low <= 1.01 <= high
    assert 182 <= held <= 200  # 0.95 of them, give or take twice the standard deviation and the bootstrap's own error
    found = common.ratio("step", [1.0, 1.0], [1.0, 1.0], goal=1.02, sure=True)
    assert str(found) == "step 1 1.02 ok [1, 1]"


SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
from _common import *
if is_worker():
    import os
    worker_result({{"rank": int(os.environ["RANK"]), "size": int(os.environ["WORLD_SIZE"]), "words": sys.argv[1:]}})
    sys.exit(int(sys.argv[1] == "fail"))
options = parse_options("Measures nothing.")
found = in_workers(2, "ok", 3)
sys.exit(finish([ratio("r", [3.0], [2.0], goal={goal})], found, options))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("goal", "code"), [(1.6, 0), (1.4, 1)])
def test_a_benchmark_writes_what_it_found_and_says_whether_goals_were_met(
    tmp_path: Path, goal: float, code: int
) -> None:
    script, out = tmp_path / "some.py", tmp_path / "results" / "some.json"
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), goal=goal))
    done = subprocess.run([sys.executable, script, "--quick", "--out", out], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout == f"r 1.5 {goal} {'short' if code else 'ok'}\n"
    record = json.loads(out.read_text())
    assert record["raw"] == {"rank": 0, "size": 2, "words": ["ok", "3"]}
    assert record["benchmark"] == "some"
    assert record["quick"] is True
    assert record["ratios"][0]["ok"] is not bool(code)
    assert {"torch", "python"} <= record["versions"].keys()
    assert record["hardware"]["cores"] >= 1


@pytest.mark.multiprocess
def test_a_failing_worker_is_reported(tmp_path: Path) -> None:
    script = tmp_path / "some.py"
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), goal=1).replace('"ok", 3', '"fail", 3'))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "workers ended with [1, 1]" in done.stderr
