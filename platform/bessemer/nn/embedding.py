"""Tables of vectors."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["embedding"]


def embedding(entries: int, features: int) -> nn.Embedding:
    """A plain table, zeros until :func:`bessemer.nn.init.init_weights`: nothing comes from the global generator."""
    return nn.Embedding(entries, features, _weight=torch.zeros(entries, features))
