"""Layers whose constructor draws nothing."""

from __future__ import annotations

from torch import nn

__all__ = ["Unset"]


class Unset(nn.Module):
    """Mixin that leaves parameters at zero; put it before the layer's class in the bases.

    They are set by :func:`bessemer.nn.init.init_weights` or `load_state_dict`. PyTorch's own constructors draw from the
    global random number generator.
    """

    def reset_parameters(self) -> None:
        """Zero all parameters of this layer."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
