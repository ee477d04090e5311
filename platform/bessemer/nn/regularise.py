"""Penalties on weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bessemer.nn.precision import full_precision

__all__ = ["modified_orthogonal"]


def modified_orthogonal(module: nn.Module, exclude: Iterable[nn.Module] = ()) -> Tensor:
    """R(W) = ‖WWᵀ ⊙ (1 - I)‖²_F, summed over all weights (BigGAN, eq. 3): filters at right angles, norms left free.

    Rows of W are filters; weights with fewer than two dimensions do not count. The gradient is the true one,
    4(WWᵀ ⊙ (1 - I))W; BigGAN-PyTorch adds half of it, so its strength means half of ours.

    Args:
        module: its own weights are meant, before spectral normalisation.
        exclude: modules below it whose weights are left alone.
    """
    left_alone = {id(p) for m in exclude for p in m.parameters()}
    terms = []
    for p in module.parameters():
        if p.ndim >= 2 and id(p) not in left_alone:
            with full_precision(p):
                W = p.flatten(1)
                products = W @ W.T
                terms.append(products.square().sum() - products.diagonal().square().sum())
    return torch.stack(terms).sum()
