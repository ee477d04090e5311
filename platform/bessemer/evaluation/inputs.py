"""Real samples that translations begin with: a fixed choice of a data set's."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.data.reading.batches import as_numbers
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.errors import EvaluationError
from bessemer.evaluation.images import RealImages, field_images
from bessemer.evaluation.reference import reference_ids
from bessemer.systems.contract import Batch, System

__all__ = ["Inputs", "blank_inputs", "inputs_for"]


class Inputs:
    """What samples are made from, and what belongs to it, in a fixed order.

    Args:
        system: whose inputs they are.
        images: a data set of the fields that the system takes, or images alone, which become inputs.
        count: how many; all where there are fewer.

    Raises:
        EvaluationError: they are of another shape than the system's inputs.
    """

    def __init__(self, system: System, images: RealImages, count: int) -> None:
        several = isinstance(images, ShardedDataset) and len(images.manifest.batch_fields) > 1
        self._fields = {name: field_images(images, name) for name in (system.takes if several else system.given)}
        count = min(count, *(len(self._fields[name]) for name in system.given))
        # Of the smaller of two domains, some images come twice.
        self._ids = {name: np.resize(reference_ids(len(f), count), count) for name, f in self._fields.items()}
        main = system.given[0]
        known = self._fields[main].labels[self._ids[main]]
        self.labels: NDArray[np.int64] = known if several else np.zeros_like(known)
        """[n] class of each; zeros where the images are not the system's kind of data set."""
        self.hash = hashlib.sha256(json.dumps([images.manifest.hash, count]).encode()).hexdigest()
        """Names them."""
        for name in system.given:
            shape, wanted = self._fields[name].read(self._ids[name][:1]).shape[1:], system.batch_shapes[name]
            if shape != wanted:
                raise EvaluationError(
                    f"inputs: {name} of shape {list(shape)}, but {system.name} was trained on {list(wanted)} "
                    "(channels, height, width); pack them with --size and --mode."
                )

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: slice, device: torch.device | str) -> Batch:
        """Some of them, as training hands them to a system."""
        raw = {name: torch.from_numpy(f.read(self._ids[name][rows])).to(device) for name, f in self._fields.items()}
        fields = {name: as_numbers(name, values) for name, values in raw.items()}
        return Batch(None, torch.from_numpy(self.labels[rows]).to(device), **fields)


def inputs_for(system: System, images: RealImages, count: int) -> Inputs | None:
    """What :class:`Inputs` says; None where the system draws from noise."""
    return Inputs(system, images, count) if system.given else None


def blank_inputs(system: System, labels: torch.Tensor) -> Batch:
    """Labels [N] with inputs of zeros, where there are any: for asking what drawing costs."""
    fields = {name: torch.zeros(len(labels), *system.batch_shapes[name], device=labels.device) for name in system.given}
    return Batch(None, labels, **fields)
