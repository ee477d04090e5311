"""Which images are drawn: labels, chunks and their random numbers, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bessemer.nn.modes import evaluation_mode
from bessemer.nn.norm import renew_statistics
from bessemer.systems.contract import Batch, System
from bessemer.training.rng import generator

if TYPE_CHECKING:
    from bessemer.evaluation.inputs import Inputs

__all__ = [
    "SAMPLE_CHUNK",
    "allocate_labels",
    "draw_chunk",
    "prepare",
    "recompute_batch_norm",
    "sampling_mode",
    "to_stored",
    "to_uint8",
]

SAMPLE_CHUNK = 32
"""Images that share one random generator; part of the protocol, so it is no setting."""

_STATISTICS_PASSES = 64
_STANDING_LABELS = 4096  # enough to hold every class in its proportion; a system draws its own number from them


def allocate_labels(class_counts: Sequence[int], samples: int) -> NDArray[np.int64]:
    """Labels [samples] whose shares are those of the data set, in a fixed shuffled order.

    Every class gets its proportion rounded down; the rest goes to the largest remainders (ties: lower index first).
    """
    if len(class_counts) < 2:
        return np.zeros(samples, dtype=np.int64)
    counts = np.asarray(class_counts, dtype=np.int64)
    exact, remainder = np.divmod(counts * samples, counts.sum())
    exact[np.argsort(-remainder, kind="stable")[: samples - exact.sum()]] += 1
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), exact)
    return np.random.default_rng(0).permutation(labels)


def prepare(
    system: System, class_counts: Sequence[int], *, seed: int, truncation: float | None, device: torch.device | str
) -> None:
    """Let the system renew its standing statistics; the same on every worker, and changes its buffers."""
    labels = torch.from_numpy(allocate_labels(class_counts, _STANDING_LABELS)).to(device)
    with torch.no_grad(), sampling_mode(system):
        system.prepare_sampling(labels, generator(device, seed, "standing"), truncation)


@torch.no_grad()
def recompute_batch_norm(system: System, class_counts: Sequence[int], *, seed: int, device: torch.device | str) -> None:
    """Replace the BatchNorm statistics of the sampled networks by those of their present weights.

    Statistics that were collected in training belong to the live weights of many moments. These are means over
    `_STATISTICS_PASSES` passes of `SAMPLE_CHUNK` samples, the same on every worker. Spectral-norm vectors stay.
    """
    labels = torch.from_numpy(allocate_labels(class_counts, SAMPLE_CHUNK * _STATISTICS_PASSES)).to(device)
    draws, chunks = generator(device, seed, "batch norm"), iter(torch.split(labels, SAMPLE_CHUNK))
    with sampling_mode(system):
        sampled = nn.ModuleList(system.networks()[name] for name in system.sampled_networks).eval()
        renew_statistics(sampled, lambda: system.sample(next(chunks), draws), _STATISTICS_PASSES)


def draw_chunk(
    system: System,
    labels: NDArray[np.int64],
    chunk: int,
    *,
    seed: int,
    truncation: float | None,
    device: torch.device | str,
    inputs: Inputs | None = None,
) -> Tensor:
    """Samples of chunk number `chunk` of the labels of a whole evaluation: [<=32, *sample_shape] float32 in [-1, 1].

    Made from `inputs`, for systems to which something is given.
    """
    rows = slice(chunk * SAMPLE_CHUNK, (chunk + 1) * SAMPLE_CHUNK)
    own = Batch(None, torch.from_numpy(labels[rows]).to(device)) if inputs is None else inputs.batch(rows, device)
    with torch.no_grad():
        return system.sample_for(own, generator(device, seed, "sample", chunk), truncation)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 in [0, 255]: the inverse of the data set's scaling, rounded to nearest."""
    return images.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_stored(field: str, samples: Tensor) -> Tensor:
    """Samples [N, ...] as a data set stores them: uint8 pixels, int16 sound, uint8 bits.

    Args:
        field: what they are, :attr:`~bessemer.systems.contract.System.sample_field`.
        samples: float32 in [-1, 1].
    """
    if field == "audio":
        return samples.float().mul(32768).round_().clamp_(-32768, 32767).to(torch.int16)
    if field == "bits":
        return samples.round().to(torch.uint8)
    return to_uint8(samples)


@contextmanager
def sampling_mode(system: System) -> Iterator[None]:
    """Evaluation mode for the networks that are sampled; every module's own mode is restored afterwards."""
    networks = system.networks()
    with evaluation_mode([networks[name] for name in system.sampled_networks]):
        yield
