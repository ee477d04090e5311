"""Errors that a person can cause and fix.

Every message names the field or file, the value found, the rule, and the fix. The command line prints
them without a traceback and exits with code 2; anything else is a defect of Bessemer and keeps its traceback.

::

    BessemerError
    ├── SpecError            a job file or an override
    ├── DataError            a data set, a shard, an image
    ├── CheckpointError      a checkpoint or a snapshot
    ├── RunError             a run directory or the state of a run
    ├── EvaluationError      a metric, an extractor, reference statistics
    ├── StoreError           an object store, or an object in it
    ├── TrackingError        the MLflow store
    ├── TrainingError        numbers that went wrong while training
    └── MachineError         ports, memory, devices, missing packages
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BessemerError",
    "CheckpointError",
    "DataError",
    "EvaluationError",
    "MachineError",
    "RunError",
    "SpecError",
    "StoreError",
    "TrackingError",
    "TrainingError",
    "some",
]


def some(items: Sequence[object], most: int = 5) -> str:
    """The first of many things, in a message: `a, b, c, d, e and 7 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


class BessemerError(Exception):
    """Base of everything that is reported to a person without a traceback."""


class SpecError(BessemerError):
    """A job file, or an override of one of its fields, breaks a rule."""


class DataError(BessemerError):
    """A data set, a shard or an image is missing, damaged or does not fit."""


class CheckpointError(BessemerError):
    """A checkpoint or snapshot is missing, damaged or of another run."""


class RunError(BessemerError):
    """A run directory cannot be used as asked."""


class EvaluationError(BessemerError):
    """A metric, extractor or reference cannot be computed."""


class StoreError(BessemerError):
    """An object store is out of reach or refuses, or an object in it is missing or not what it was."""


class TrackingError(BessemerError):
    """The tracking store refuses or is out of reach."""


class TrainingError(BessemerError):
    """Training cannot go on: the numbers are wrong."""


class MachineError(BessemerError):
    """This machine lacks something that the command needs."""
