"""What the benchmarks share: sides in turn, medians and their spread, groups of processes, what is printed and written.

A benchmark is ``python benchmarks/NAME.py [--quick] [--out FILE]``. It measures its sides in turn in one process tree,
prints one line per ratio, ``name value goal ok|short``, writes command, versions, hardware and raw numbers as JSON when
asked, and exits with 1 when a goal that it states is missed::

    options = parse_options(__doc__)
    seconds = alternate({"ours": ours, "plain": plain}, rounds=3 if options.quick else 30)
    return finish([ratio("step", seconds["ours"], seconds["plain"], goal=1.03)], {"seconds": seconds}, options)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "Options",
    "Ratio",
    "alternate",
    "finish",
    "in_workers",
    "interval",
    "is_worker",
    "parse_options",
    "ratio",
    "spread",
    "worker_result",
]

_PACKAGES = ("bessemer", "torch", "deepspeed", "numpy", "safetensors", "webdataset")
_RESULT = "BESSEMER_BENCHMARK_RESULT"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """The command line that all benchmarks share."""

    quick: bool
    """End within a minute: the path is exercised, the numbers say little."""
    out: Path | None
    """File for the JSON."""
    images: int | None = None
    """How many images, where the benchmark asks."""
    parts: tuple[str, ...] = ()
    """What to measure, of a benchmark that has several parts; all of them unless the command line names some."""
    rounds: int | None = None
    """How many rounds, where the benchmark asks."""


def parse_options(
    description: str | None, *, images: str | None = None, parts: Sequence[str] = (), rounds: str | None = None
) -> Options:
    """Read `--quick` and `--out`; the first line of `description` is the help's.

    Args:
        description: of the benchmark.
        images: what `--images` means, for a benchmark that has this option.
        parts: what `--only` may choose from, likewise.
        rounds: what `--rounds` means, likewise.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    if images is not None:
        parser.add_argument("--images", type=int, help=images)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, help=rounds)
    if parts:
        parser.add_argument("--only", action="append", choices=parts, help="measure this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="end within a minute; the numbers then say little")
    parser.add_argument("--out", type=Path, help="write command, versions, hardware and raw numbers as JSON")
    found = parser.parse_args()
    chosen = getattr(found, "only", None) or parts
    return Options(
        found.quick, found.out, getattr(found, "images", None), tuple(chosen), getattr(found, "rounds", None)
    )


def alternate(
    sides: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    warm_up: int = 1,
    note: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """What each side returns in each of `rounds`, the sides taking turns.

    Every second round runs in reverse order, so that neither a machine that slows down nor what a side leaves in the
    caches favours one of them. In a group of processes all must call this with the same arguments.

    Args:
        sides: name -> runs this side once and returns its number, such as seconds.
        rounds: of all sides.
        warm_up: rounds before them that do not count.
        note: told the name of the side before each turn (for barriers between the sides).
    """
    numbers: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            if note is not None:
                note(name)
            value = sides[name]()
            if number >= warm_up:
                numbers[name].append(value)
    return numbers


def spread(values: Iterable[float]) -> float:
    """Distance between the first and the third quartile, as a share of the median."""
    found = sorted(values)
    if len(found) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(found, n=4)
    return (high - low) / middle if middle else 0.0


def interval(values: Sequence[float], draws: int = 10_000, share: float = 0.95) -> tuple[float, float]:
    """Between what the median lies with this probability, by drawing so many samples again from these values.

    The percentile bootstrap (Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3).
    """
    generator = random.Random(0)  # for no secret, and the same interval for the same values
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    out = round(draws * (1 - share) / 2)
    return medians[out], medians[-1 - out]


@dataclass(frozen=True)
class Ratio:
    """One measured ratio."""

    name: str
    value: float
    goal: float | None = None
    """What it must not exceed; None states no goal."""
    spread: float | None = None
    """Of the rounds' own ratios: interquartile distance over median."""
    rounds: int | None = None
    interval: tuple[float, float] | None = None
    """Of the value, with a probability of 95 %, where there are enough rounds to tell."""

    @property
    def ok(self) -> bool:
        return self.goal is None or self.value <= self.goal

    def __str__(self) -> str:
        goal = "-" if self.goal is None else f"{self.goal:g}"
        between = "" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        return f"{self.name} {self.value:.4g} {goal} {'ok' if self.ok else 'short'}{between}"


def ratio(
    name: str, ours: Sequence[float], theirs: Sequence[float], goal: float | None = None, *, sure: bool = False
) -> Ratio:
    """Median over the rounds of ours / theirs: the two of a round ran next to each other on the same machine.

    Args:
        name: of the ratio.
        ours: a number per round.
        theirs: likewise.
        goal: what the ratio must not exceed.
        sure: whether to say between what it lies.
    """
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(name, statistics.median(each), goal, spread(each), len(each), interval(each) if sure else None)


def finish(ratios: Sequence[Ratio], raw: Mapping[str, Any], options: Options) -> int:
    """Print the ratios, write the JSON if it was asked for, and return the exit code.

    Args:
        ratios: what was found.
        raw: raw numbers, by name; seconds unless the name says otherwise.
        options: the command line.
    """
    for one in ratios:
        print(one)
    if options.out is not None:
        record = {
            "benchmark": Path(sys.argv[0]).stem,
            "command": ["python", *sys.argv],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": options.quick,
            "ratios": [{**asdict(one), "ok": one.ok} for one in ratios],
            "raw": dict(raw),
            "versions": _versions(),
            "hardware": _hardware(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(one.ok for one in ratios) else 1


# Groups of processes. A benchmark of several workers starts itself once per worker; the first worker's result returns.


def is_worker() -> bool:
    """Whether this process was started by :func:`in_workers`."""
    return _RESULT in os.environ


def in_workers(size: int, *arguments: object, threads: int = 1, timeout: float = 1800) -> Any:
    """Run this script in `size` processes, as torchrun would, and return what the first passed to `worker_result`.

    Args:
        size: processes.
        arguments: command line of each.
        threads: OMP_NUM_THREADS of each.
        timeout: seconds for all of it.

    Raises:
        RuntimeError: a process failed; holds what it printed.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        env = {**os.environ, _RESULT: str(out), "OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, sys.argv[0], *map(str, arguments)]
        logs = [Path(directory) / f"log-{rank}" for rank in range(size)]
        workers = []
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                workers.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
        try:
            codes = [worker.wait(timeout) for worker in workers]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        if any(codes):
            raise RuntimeError(f"workers ended with {codes}:\n" + "\n".join(log.read_text() for log in logs))
        return json.loads(out.read_text())


def worker_result(value: Any) -> None:
    """Hand a JSON value from the first worker to the process that started it; the other workers' are dropped."""
    if os.environ["RANK"] == "0":
        Path(os.environ[_RESULT]).write_text(json.dumps(value))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})


def _hardware() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    found["cpu"] = names[0] if names else platform.processor()
    found["load_average"] = [round(value, 2) for value in os.getloadavg()]
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found
