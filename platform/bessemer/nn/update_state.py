"""Layer state that changes once per update, not once per forward pass.

A worker that owns more slices runs more forward passes per update. If spectral-norm vectors or BatchNorm
statistics moved in every pass, a run would depend on the number of workers. Here they move once per update,
from sums over all slices of all workers, so that one worker and a hundred see the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["UpdateState", "UpdateStateLayer", "begin_update", "end_update"]


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


class UpdateState:
    """The layers of some networks that have per-update state and are in training mode, looked up once per update."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        modules = (module for network in networks for module in network.modules())
        self._layers = [m for m in modules if isinstance(m, UpdateStateLayer) and m.training]

    @torch.no_grad()
    def begin(self) -> None:
        """Open an update on every layer."""
        for layer in self._layers:
            layer.begin_update()

    def pending(self) -> list[Tensor]:
        """This worker's sums that :meth:`commit` would commit, live."""
        return [t for layer in self._layers for t in layer.pending()]

    @torch.no_grad()
    def sum(self, all_reduce: Callable[[Tensor], object], *also: Tensor) -> None:
        """Sum all pending tensors, and those in `also`, over the workers, in place and in one flat call.

        Args:
            all_reduce: sums a 1-D tensor over the workers in place; float64 if a tensor is, else float32.
            also: tensors of any shape that share the call.
        """
        tensors = [*self.pending(), *also]
        if tensors:
            flat = torch.cat([t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
            all_reduce(flat)
            for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @torch.no_grad()
    def commit(self) -> None:
        """Let every layer take over the sums of all workers."""
        for layer in self._layers:
            layer.end_update()


def begin_update(networks: Iterable[nn.Module]) -> UpdateState:
    """Open an update on every layer of `networks` that is in training mode."""
    state = UpdateState(networks)
    state.begin()
    return state


def end_update(networks: Iterable[nn.Module], all_reduce: Callable[[Tensor], object] | None = None) -> None:
    """Close an update at once: :meth:`UpdateState.sum`, unless there is one worker, and :meth:`UpdateState.commit`."""
    state = UpdateState(networks)
    if all_reduce is not None:
        state.sum(all_reduce)
    state.commit()
