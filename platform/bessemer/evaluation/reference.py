"""Features of the real images: a fixed choice of them, kept between evaluations and runs."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from dataclasses import dataclass
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
        return FeatureSet(own.features[rows], own.ids[rows], own.labels[rows], own.classes)


def reference_features(
    images: RealImages, extractor: Extractor, count: int, directory: Path | None, team: Team
) -> Reference:
    """Features of a fixed choice of images, from the cache if every worker finds them there."""
    ids = reference_ids(len(images), count)
    classes = tuple(images.manifest.classes)

    def found(features: Features) -> Reference:
        own = FeatureSet(features, ids, np.asarray(images.labels)[ids], classes)
        return Reference(own, len(images), images.manifest.hash, extractor)

    key = reference_hash(images.manifest.hash, extractor, count)
    path = reference_path(directory or cache_dir() / "reference", extractor, key)
    kept = load_reference(path, key, (count, extractor.dimension))
    if all(team.group.gather(kept is not None)) and kept is not None:
        return found(kept)
    own = [np.empty((0, extractor.dimension), dtype=np.float32)]  # a worker may have no batch
    for batch in team.counted_batches(f"real images, {extractor.name}", count):
        rows = np.empty((len(batch), extractor.dimension), dtype=np.float32)
        for positions, pixels in read_in_groups(images, ids[batch.start : batch.stop]):
            rows[positions] = team.features(extractor, torch.from_numpy(pixels)).cpu().numpy()
        own.append(rows)
    features = team.join(count, team.group.gather(np.concatenate(own)))
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
