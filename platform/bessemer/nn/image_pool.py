"""A pool of generated images that a discriminator is shown in place of the newest ones."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from bessemer.nn.slice_memory import SliceMemory

__all__ = ["ImagePool"]


class ImagePool(nn.Module):
    """History of generated images (Shrivastava et al. 2017, arXiv:1612.07828, section 2.3), as CycleGAN keeps it.

    While the pool is filling, an image is stored and handed back. From then on a coin decides: the image is handed back
    and not kept, or it takes the place of a random old one, which is handed back instead. Each slice of the global
    batch has an equal share of the pool to itself, and what it holds changes as the update ends.

    Args:
        size: images of all slices together, a multiple of the number of slices; 0 hands every image back.
        shape: of an image.
    """

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        self.images, self.filled = SliceMemory(size, shape), SliceMemory(size, ())

    @torch.no_grad()
    def query(self, images: Tensor, index: int, slices: int, generator: Generator) -> Tensor:
        """Images to show for new ones, [N, ...], one after the other.

        Args:
            images: [N, *shape], new ones.
            index: of their slice.
            slices: of the global batch.
            generator: of coins and places, on the device of the images.
        """
        if not self.size:
            return images
        pool, filled = (memory.read(index, slices).clone() for memory in (self.images, self.filled))
        n, rows = len(images), len(pool)
        coins = torch.rand(n, generator=generator, device=generator.device)
        picks = torch.randint(rows, (n, 1), generator=generator, device=generator.device)
        shown = []
        for image, coin, pick in zip(images.to(pool.dtype), coins, picks, strict=True):  # nothing waits for the device
            stored = filled.sum()
            full = stored >= rows
            place = torch.where(full, pick, stored.long().clamp(max=rows - 1))
            old = pool.index_select(0, place)[0]
            swapped = full & (coin < 0.5)
            shown.append(torch.where(swapped, old, image))
            pool.index_copy_(0, place, torch.where(full & ~swapped, old, image)[None])
            filled.index_fill_(0, place, 1.0)
        self.images.write(index, slices, pool)
        self.filled.write(index, slices, filled)
        return torch.stack(shown).to(images.dtype)
