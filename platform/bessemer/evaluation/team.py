"""Workers that evaluate together: how images are dealt to them, and how their features come together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import Extractor
from bessemer.evaluation.metrics import Gaussian
from bessemer.evaluation.sampling import SAMPLE_CHUNK

__all__ = ["ALONE", "Features", "Group", "Moments", "Progress", "Team", "in_chunks"]

Features = NDArray[np.float32]
Number = TypeVar("Number", bound=np.floating)
Progress = Callable[[str, int, int], None]
"""Called with what is being done, the images done and all images; on each worker for its own share."""


class Group(Protocol):
    """This worker among the others; :class:`bessemer.training.distributed.Workers` has it."""

    @property
    def rank(self) -> int:
        """This worker, from 0."""

    @property
    def size(self) -> int:
        """Number of workers."""

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank, on every worker."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place."""


class _Alone:
    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


ALONE: Group = _Alone()
"""The only worker."""


def in_chunks(
    total: int,
    values: Callable[[int, slice], NDArray[np.float64]],
    group: Group,
    advance: Callable[[int, int], None] = lambda *_: None,
) -> NDArray[np.float64]:
    """Values of `total` samples, computed chunk by chunk by all workers together; the same on any number of them.

    Args:
        total: samples.
        values: number of a chunk, and its samples -> [..., n] values of them.
        group: this worker among the others.
        advance: called with the samples that are done and all of them, of this worker's share.

    Returns:
        [..., total], on every worker.
    """
    own = range(group.rank, -(-total // SAMPLE_CHUNK), group.size)
    found: dict[int, NDArray[np.float64]] = {}
    for done, chunk in enumerate(own, 1):
        found[chunk] = values(chunk, slice(chunk * SAMPLE_CHUNK, (chunk + 1) * SAMPLE_CHUNK))
        advance(min(done * SAMPLE_CHUNK, total), len(own) * SAMPLE_CHUNK)
    every = {chunk: part for share in group.gather(found) for chunk, part in share.items()}
    return np.concatenate([every[chunk] for chunk in sorted(every)], axis=-1)


@dataclass(frozen=True)
class Team:
    """This worker among the others, and how work is dealt: in batches of whole chunks, like cards."""

    group: Group
    batch_size: int
    progress: Progress

    def batches(self, total: int, rank: int | None = None) -> Iterator[range]:
        """Image numbers of each batch of this worker, or of another, for `total` images."""
        size = max(self.batch_size // SAMPLE_CHUNK, 1) * SAMPLE_CHUNK
        first = (self.group.rank if rank is None else rank) * size
        for start in range(first, total, self.group.size * size):
            yield range(start, min(start + size, total))

    def counted_batches(self, what: str, total: int) -> Iterator[range]:
        """This worker's batches, with progress reported after each."""
        own = list(self.batches(total))
        images = sum(map(len, own))
        done = 0
        for batch in own:
            yield batch
            done += len(batch)
            self.progress(what, done, images)

    def features(self, extractor: Extractor, images: Tensor) -> Tensor:
        """Features of one batch, in as many forward passes as the batch size asks for.

        Args:
            extractor: of images.
            images: [N, C, H, W], or clips [N, T, C, H, W].

        Returns:
            [N, d]; of clips [N, T * d].

        Raises:
            EvaluationError: they are neither.
        """
        if images.ndim not in (4, 5):
            raise EvaluationError(f"extractor {extractor.name}: sees images and clips, and this is neither.")
        pictures = images.flatten(0, -4)
        passes = torch.split(pictures, max(self.batch_size, 1)) if self.batch_size < SAMPLE_CHUNK else (pictures,)
        return torch.cat([extractor.features(part) for part in passes]).reshape(len(images), -1)

    def join(self, total: int, parts: Sequence[NDArray[Number]]) -> NDArray[Number]:
        """The workers' features, each in the order of its batches, in the order of the images."""
        whole = np.empty((total, max(part.shape[1] for part in parts)), dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            if len(part):  # a worker may have no batch
                whole[np.concatenate([*self.batches(total, rank)])] = part
        return whole


class Moments:
    """Sums of features and of their products, in float64: what a Frechet distance needs, in one tensor to add up.

    Sums are taken of differences from `origin`, such as the mean of the real features: so the covariance, a difference
    of two sums, loses no digits where features are far from zero.

    Args:
        origin: [d] any vector, the same on every worker.
        device: where the sums are kept.
    """

    def __init__(self, origin: NDArray[np.float64], device: torch.device | str = "cpu") -> None:
        self._origin = torch.from_numpy(origin).to(device)
        d = len(origin)
        self.sums = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)  # of [f, 1] [f, 1]'

    def add(self, features: Tensor) -> None:
        """Take [n, d] features in."""
        ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
        rows = torch.cat([features.double() - self._origin.to(features.device), ones], dim=1)
        self.sums += (rows.T @ rows).to(self.sums.device)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of all that were taken in."""
        sums = self.sums.cpu().numpy()
        count = sums[-1, -1]
        mean = sums[:-1, -1] / count
        cov = (sums[:-1, :-1] - count * np.outer(mean, mean)) / (count - 1)
        return Gaussian(mean + self._origin.cpu().numpy(), cov, None)
