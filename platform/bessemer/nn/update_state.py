"""Layer state that changes once per update, not once per forward pass.

A worker that owns more slices runs more forward passes per update. If spectral-norm vectors or BatchNorm
statistics moved in every pass, a run would depend on the number of workers. Here they move once per update,
from sums over all slices of all workers, so that one worker and a hundred see the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["UpdateStateLayer", "begin_update", "end_update", "pending_sums"]


class UpdateStateLayer(nn.Module):
    """A layer with per-update state. Only layers in training mode are asked to move it."""

    def begin_update(self) -> None:
        """Called before the first slice of every update: renew what the slices will share."""

    def pending(self) -> list[Tensor]:
        """Sums over this worker's slices since :meth:`begin_update`; they are summed over the workers in place.

        A worker that ran no forward pass must still return tensors of the same shapes (zeros).
        """
        return []

    def end_update(self) -> None:
        """Called once the sums of :meth:`pending` hold all workers' shares: commit them."""


def _layers(networks: Iterable[nn.Module]) -> list[UpdateStateLayer]:
    return [m for net in networks for m in net.modules() if isinstance(m, UpdateStateLayer) and m.training]


def pending_sums(networks: Iterable[nn.Module]) -> list[Tensor]:
    """This worker's sums that :func:`end_update` would commit, live."""
    return [t for layer in _layers(networks) for t in layer.pending()]


@torch.no_grad()
def begin_update(networks: Iterable[nn.Module]) -> None:
    """Open an update on every layer of `networks` that is in training mode."""
    for layer in _layers(networks):
        layer.begin_update()


@torch.no_grad()
def end_update(networks: Iterable[nn.Module], all_reduce: Callable[[Tensor], object] | None = None) -> None:
    """Close the update: sum all pending tensors over the workers in one flat call and commit them.

    Args:
        all_reduce: sums a 1-D float32 tensor over the workers in place; ``None`` on one worker.
    """
    layers, pending = _layers(networks), pending_sums(networks)
    if pending and all_reduce is not None:
        flat = torch.cat([t.reshape(-1).float() for t in pending])
        all_reduce(flat)
        for tensor, total in zip(pending, torch.split(flat, [t.numel() for t in pending]), strict=True):
            tensor.copy_(total.view_as(tensor))
    for layer in layers:
        layer.end_update()
