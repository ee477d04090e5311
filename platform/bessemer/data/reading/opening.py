"""From a job's section `data` to its data set."""

from __future__ import annotations

from pathlib import Path

from bessemer.data.manifest import Manifest
from bessemer.data.reading.dataset import ShardedDataset, load_manifest
from bessemer.data.reading.pipe import PipeStore
from bessemer.data.reading.quarantine import Quarantine
from bessemer.data.reading.shard_cache import ShardCache, default_cache_directory
from bessemer.spec.job import DataSpec
from bessemer.stores.opening import is_remote
from bessemer.stores.store import Store

__all__ = ["load_job_manifest", "open_job_data"]


def open_job_data(spec: DataSpec) -> ShardedDataset:
    """The data set of a job, with its cache and with what it does about damaged samples.

    Raises:
        DataError: the set is not there, or not whole.
        StoreError: the store cannot be reached.
    """
    quarantine = Quarantine(spec.max_bad_samples) if spec.on_bad_sample == "quarantine" else None
    cache = None
    if is_remote(spec.path):
        directory = Path(spec.cache_dir).expanduser() if spec.cache_dir else default_cache_directory()
        cache = ShardCache(directory, round(spec.cache_gb * 1e9))
    return ShardedDataset.open(spec.path, cache=cache, store=_store(spec), quarantine=quarantine)


def load_job_manifest(spec: DataSpec) -> Manifest:
    """The manifest of a job's data set; errors as :func:`open_job_data`."""
    return load_manifest(spec.path, _store(spec))


def _store(spec: DataSpec) -> Store | None:
    """The store that a job may name and other addresses may not."""
    return PipeStore(spec.path) if spec.path.startswith("pipe:") and spec.allow_pipe else None
