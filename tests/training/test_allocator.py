"""Memory that is freed stays with the process, unless its environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORK = """
import ctypes, resource, sys
from bessemer.training.allocator import keep_freed_memory

kept = keep_freed_memory() if "keep" in sys.argv else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def step():  # 24 blocks of 16 MiB, the last first: free memory at the end of the heap is what is given back
    blocks = [libc.malloc(16 << 20) for _ in range(24)]
    for block in blocks:
        ctypes.memset(block, 1, 16 << 20)
    for block in reversed(blocks):
        libc.free(block)

[step() for _ in range(3)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
[step() for _ in range(5)]
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""
PAGES = 24 * (16 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(*words: str, **environment: str) -> tuple[str, int]:
    """What is said of keeping memory, and the pages per step that the kernel had to provide."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", WORK, *words], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's allocator")
def test_freed_memory_is_kept() -> None:
    said, count = faults("keep")
    assert said == "True"
    assert count < 0.01 * PAGES
    _, without = faults()
    assert without > 10 * max(count, 1)


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_of_a_person_hold(environment: dict[str, str]) -> None:
    said, count = faults("keep", **environment)
    assert said == "False"
    assert count > 100
