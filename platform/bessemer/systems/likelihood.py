"""Systems that give the probability of a sample, or a lower bound of it."""

from __future__ import annotations

from abc import abstractmethod

from torch import Generator, Tensor

from bessemer.systems.contract import Batch, System

__all__ = ["LikelihoodSystem"]


class LikelihoodSystem(System):
    """A system that gives the probability of an image or a piece of sound, or a lower bound of it."""

    @property
    @abstractmethod
    def likelihood_protocol(self) -> str:
        """What samples are before their probability is taken, such as `8 bits, not dequantised`."""

    @abstractmethod
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:
        """Log probability of discrete samples with the networks as they are, or a lower bound, [N] float64 in nats.

        Args:
            batch: real samples.
            generator: source of latents, on the device of the networks.
            importance_samples: draws of the latents per image; more make the bound tighter (IWAE, Burda et al. 2016,
                arXiv:1509.00519, eq. 8). Exact likelihoods ignore it.
        """
