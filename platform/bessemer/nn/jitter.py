"""Random jitter: images a little enlarged and cropped back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["jitter"]


def jitter(images: Sequence[Tensor], margin: int, generator: Generator) -> list[Tensor]:
    """Enlarge square images by `margin` pixels, and crop them back to their size at a place drawn for each sample.

    Args:
        images: tensors [N, C, R, R] of what belongs together, whose channels may differ: cropped alike.
        margin: 0 changes nothing.
        generator: on their device.
    """
    if not margin:
        return list(images)
    n, size, device = len(images[0]), images[0].shape[-1], images[0].device
    corners = torch.randint(margin + 1, (2, n, 1), generator=generator, device=generator.device).to(device)
    rows, columns = corners + torch.arange(size, device=device)
    sample = torch.arange(n, device=device)[:, None, None]
    found = []
    for x in images:
        large = F.interpolate(x, size + margin, mode="bilinear", align_corners=False)
        found.append(large[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1))
    return found
