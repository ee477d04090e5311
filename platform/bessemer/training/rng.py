"""Random numbers as a pure function of their purpose.

Nothing in Bessemer draws from a global generator. A generator is made for each use from (seed, purpose, ...),
so a run is the same on any number of workers and resuming needs no generator state.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive_seed", "generator"]


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed from the run's seed and what the numbers are for.

    Purposes are hashed with their types and lengths, so that ``("a", 1)`` and ``("a1",)`` differ.
    """
    text = "|".join(f"{type(p).__name__}:{len(str(p))}:{p}" for p in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, seed: int, *purpose: int | str) -> torch.Generator:
    """A fresh generator on `device` for one purpose, such as ``(seed, "latents", nimg, slice)``."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))
