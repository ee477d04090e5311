#!/usr/bin/env python
"""Write constraints.txt from this environment: the versions with which the tests passed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

HEADER = """\
# The tested set: every package, at the version with which the tests passed on Python 3.11, Linux.
# Every install command uses it (pip install --constraint constraints.txt ...). Written by scripts/lock.py.
# Packages that no longer support Python 3.10 are left free there; 3.10, 3.12 and 3.13 are allowed, 3.11 is tested.
# torch is pinned without a build suffix: pip takes whichever build its index offers (on Linux, PyPI's is CUDA).
"""
SKIP = {"bessemer", "pip"}


def main() -> None:
    """Write the file at the root of the repository."""
    pins = {}
    for package in metadata.distributions():
        name = package.metadata["Name"]
        if name.lower() in SKIP:
            continue
        supports_310 = SpecifierSet(package.metadata.get("Requires-Python") or "").contains("3.10.99")
        marker = "" if supports_310 else ' ; python_version >= "3.11"'
        pins[name.lower()] = f"{name}=={package.version.partition('+')[0]}{marker}"
    lines = [pins[name] for name in sorted(pins)]
    target = Path(__file__).resolve().parent.parent / "constraints.txt"
    target.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
