"""Vector quantisation with a codebook of moving averages (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from bessemer.nn.precision import full_precision
from bessemer.nn.update_state import UpdateStateLayer

__all__ = ["Codebook"]


class Codebook(UpdateStateLayer):
    """K codes of D dimensions. Each is the moving average of the vectors that were nearest to it.

    The averages move once per update, by sums over all slices of all workers.

    Args:
        codes: K.
        dim: D.
        decay: γ of the moving averages.
        eps: added to each code's count, so that none divides by zero (Laplace smoothing).
    """

    codes: Tensor
    """[K, D]"""
    counts: Tensor
    """N_i: moving averages of how many vectors chose each code, [K]."""
    sums: Tensor
    """m_i: moving averages of their sums, [K, D]."""
    sum_counts: Tensor
    sum_vectors: Tensor

    def __init__(self, codes: int, dim: int, *, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("codes", torch.zeros(codes, dim))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))
        self.register_buffer("sum_counts", torch.zeros(codes), persistent=False)
        self.register_buffer("sum_vectors", torch.zeros(codes, dim), persistent=False)

    @torch.no_grad()
    def start_at(self, codes: Tensor) -> None:
        """Begin with these codes [K, D], each as if one vector had chosen it."""
        self.codes.copy_(codes)
        self.sums.copy_(codes)
        self.counts.fill_(1)

    def init_weights(self, generator: Generator) -> None:
        """Codes from N(0, 1)."""
        self.start_at(torch.randn(self.codes.shape, generator=generator, device=generator.device))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code to each vector (eq. 1): [N, D, H, W] -> [N, H, W] int64."""
        with full_precision(z):
            flat = z.float().movedim(1, -1)
            distances = self.codes.square().sum(1) - 2 * flat @ self.codes.T  # ‖z‖² is the same for all codes
            return distances.argmin(-1)

    def look_up(self, index: Tensor) -> Tensor:
        """[N, H, W] -> codes [N, D, H, W]."""
        return torch.nn.functional.embedding(index, self.codes).movedim(-1, 1)

    @torch.no_grad()
    def observe(self, z: Tensor, index: Tensor) -> None:
        """Count vectors [N, D, H, W] and the codes that they chose; the averages move as the update ends."""
        flat = z.float().movedim(1, -1).reshape(-1, z.shape[1])
        self.sum_counts.index_add_(0, index.flatten(), torch.ones_like(flat[:, 0]))
        self.sum_vectors.index_add_(0, index.flatten(), flat)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace each vector by its code; gradients pass straight through (section 3.2).

        Args:
            z: [N, D, H, W].

        Returns:
            Codes, their indices [N, H, W], and the commitment loss E‖z - sg[e]‖², a scalar mean over all elements.
        """
        index = self.nearest(z)
        e = self.look_up(index)
        commitment = (z.float() - e).square().mean()
        return z + (e - z).detach(), index, commitment

    def begin_update(self) -> None:
        for total in self.pending():
            total.zero_()

    def pending(self) -> list[Tensor]:
        return [self.sum_counts, self.sum_vectors]

    def end_update(self) -> None:
        """N_i = γN_i + (1 - γ)n_i, m_i = γm_i + (1 - γ)Σz, e_i = m_i/N_i, with counts smoothed; nothing unobserved."""
        moved = (self.sum_counts.sum() > 0).to(self.counts.dtype)  # a tensor: a branch would wait for the device
        rate = (1 - self.decay) * moved
        self.counts.lerp_(self.sum_counts, rate)
        self.sums.lerp_(self.sum_vectors, rate)
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + len(self.counts) * self.eps) * total
        self.codes.lerp_(self.sums / smoothed.unsqueeze(1), moved)
