"""Where evaluation keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """Directory for what can be made again: ``BESSEMER_CACHE``, or ``~/.cache/bessemer``."""
    said = os.environ.get("BESSEMER_CACHE")
    return Path(said).expanduser() if said else Path.home() / ".cache" / "bessemer"
