"""Features of the real images: a fixed choice of them, kept between evaluations and runs."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.evaluation.compute import FeatureSet
from bessemer.evaluation.extractors import Extractor
from bessemer.evaluation.images import RealImages, read_in_groups
from bessemer.evaluation.team import Features, Team
from bessemer.files import cache_dir, write_atomically

__all__ = [
    "Reference",
    "joined",
    "load_reference",
    "reference_features",
    "reference_hash",
    "reference_ids",
    "reference_path",
    "save_reference",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Features of images that are there already: the real ones, or those that others made."""

    features: FeatureSet
    images: int
    """Images of the whole set."""
    data_hash: str
    extractor: Extractor

    def part(self, count: int) -> FeatureSet:
        """The features of the first choice of `count` images, all of which must be here."""
        if count >= len(self.features):
            return self.features
        assert len(self.features) == self.images, "a choice of a choice is another choice"
        rows, own = reference_ids(self.images, count), self.features
        return replace(own, features=own.features[rows], ids=own.ids[rows], labels=own.labels[rows])


def reference_features(
    images: RealImages, extractor: Extractor, count: int, directory: Path | None, team: Team
) -> Reference:
    """Features of a fixed choice of images, from the cache if every worker finds them there."""
    ids = reference_ids(len(images), count)
    classes = tuple(images.manifest.classes)

    def found(features: Features) -> Reference:
        frames = features.shape[1] // extractor.dimension
        own = FeatureSet(features, ids, np.asarray(images.labels)[ids], classes, frames)
        return Reference(own, len(images), images.manifest.hash, extractor)

    key = reference_hash(images.manifest.hash, extractor, count)
    path = reference_path(directory or cache_dir() / "reference", extractor, key)
    kept = load_reference(path, key, (count, extractor.dimension))
    if all(team.group.gather(kept is not None)) and kept is not None:
        return found(kept)
    own: list[Features] = []
    for batch in team.counted_batches(f"real images, {extractor.name}", count):
        positions, rows = [], []
        for numbers, pixels in read_in_groups(images, ids[batch.start : batch.stop]):
            positions.append(numbers)
            rows.append(team.features(extractor, torch.from_numpy(pixels)).cpu().numpy())
        own.append(np.concatenate(rows)[np.argsort(np.concatenate(positions))])
    features = team.join(count, team.group.gather(joined(own, extractor.dimension)))
    if kept is None:
        try:
            save_reference(path, key, features)
        except OSError as e:
            _log.warning("reference features are computed again next time: %s cannot be written (%s)", path, e)
    return found(features)


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


def joined(parts: Sequence[Features], dimension: int) -> Features:
    """A worker's features of all its batches; it may have none."""
    return np.concatenate(parts) if parts else np.empty((0, dimension), dtype=np.float32)


def load_reference(path: Path, key: str, shape: tuple[int, int]) -> Features | None:
    """Features as they were saved: [images, dimension], or a multiple of that for clips.

    None if the file is missing, torn or of another kind.
    """
    try:
        # Opened here, because NumPy leaves the files of broken archives open. Each member carries a checksum.
        with path.open("rb") as f, np.load(f, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            features = file["features"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if features.ndim != 2 or len(features) != shape[0] or features.dtype != np.float32:
        return None
    if features.shape[1] < shape[1] or features.shape[1] % shape[1]:
        return None
    return np.asarray(features, dtype=np.float32)


def save_reference(path: Path, key: str, features: Features) -> None:
    """Keep features for the next evaluation. Several workers and runs may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: np.savez(f, key=np.array(key), features=features))
