"""Features of the real images: a fixed choice of them, kept between evaluations and runs."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bessemer.evaluation.extractors import Extractor
from bessemer.files import write_atomically

__all__ = ["RealImages", "load_reference", "reference_hash", "reference_ids", "reference_path", "save_reference"]

Features = NDArray[np.float32]


class RealImages(Protocol):
    """What evaluation asks of a data set; :class:`bessemer.data.dataset.ShardedDataset` has it."""

    @property
    def manifest(self) -> Any:
        """Its `hash` names the images."""

    def __len__(self) -> int: ...

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [N, C, H, W] of these numbers."""


def reference_ids(images: int, count: int) -> NDArray[np.int64]:
    """Which `count` of `images` real images are the reference: all, or a fixed random choice; ascending."""
    if count >= images:
        return np.arange(images, dtype=np.int64)
    return np.sort(np.random.default_rng(0).permutation(images)[:count]).astype(np.int64)


def reference_hash(data_hash: str, extractor: Extractor, count: int) -> str:
    """Hash of all that the reference features depend on."""
    facts = {
        "data": data_hash,
        "count": count,
        "choice": "permutation(default_rng(0))",
        "extractor": extractor.name,
        "weights": extractor.weights_sha256,
        "preprocessing": extractor.preprocessing,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def reference_path(directory: Path, extractor: Extractor, key: str) -> Path:
    """File of the features that `key` names."""
    return directory / f"{extractor.name}-{key[:32]}.npz"


def load_reference(path: Path, key: str, shape: tuple[int, int]) -> Features | None:
    """Features [images, dimension] as they were saved; ``None`` if the file is missing, torn or of another kind."""
    try:
        # Opened here, because NumPy leaves the files of broken archives open. Each member carries a checksum.
        with path.open("rb") as f, np.load(f, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            features = file["features"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if features.shape != shape or features.dtype != np.float32:
        return None
    return np.asarray(features, dtype=np.float32)


def save_reference(path: Path, key: str, features: Features) -> None:
    """Keep features for the next evaluation. Several workers and runs may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: np.savez(f, key=np.array(key), features=features))
