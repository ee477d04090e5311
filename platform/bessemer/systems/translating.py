"""Systems whose samples are made from real images: of one kind from another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Generator, Tensor

from bessemer.systems.contract import Batch, System

__all__ = ["TranslationSystem"]


class TranslationSystem(System):
    """A system that translates the field `images` of a batch; there is no sample without an input."""

    given: ClassVar[tuple[str, ...]] = ("images",)

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Nothing is drawn from noise alone; see :meth:`sample_for`."""
        raise NotImplementedError(f"{self.name} makes samples from inputs: sample_for")

    @abstractmethod
    def sample_for(self, batch: Batch, generator: Generator, truncation: float | None = None) -> Tensor:
        """Translate `batch.images`, [N, C, R, R] in [-1, 1] to images like the last field of :attr:`takes`."""

    def views(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """What a sheet shows of each sample, from top to bottom: name -> [N, C, R, R] in [-1, 1].

        Args:
            batch: inputs; targets or others where there are any.
            generator: as for :meth:`sample_for`.
        """
        shown = {"input": batch.images, "output": self.sample_for(batch, generator)}
        return shown | ({"target": batch["targets"]} if "targets" in batch.names else {})
