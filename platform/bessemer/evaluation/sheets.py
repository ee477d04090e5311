"""Sheets that a run leaves at its end: what truncation takes, ways between latents, one latent in all classes.

They are for systems whose images are functions of latents: one pass draws an image, so all of them cost a few seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.evaluation.grid import device_of, draw_truncated, row_labels, tile
from bessemer.evaluation.paths import slerp
from bessemer.evaluation.sampling import prepare, sampling_mode, to_uint8
from bessemer.systems.contract import System
from bessemer.training.rng import generator

__all__ = ["Drawn", "class_sheet", "interpolation_sheet", "sheets_of", "truncations_sheet"]

_COLUMNS, _PATHS, _MOST_CLASSES = 8, 4, 32
_TRUNCATIONS: Final = (0.5, 1.0, None)
_EDGE: Final = 128  # pixels of an image on a sheet


class Drawn(NamedTuple):
    """A sheet, and what is said of it."""

    name: str
    title: str
    note: str
    pixels: NDArray[np.uint8]
    """[H, W, C]."""


def sheets_of(system: System, class_counts: Sequence[int], rows: int, seed: int = 0) -> Iterator[Drawn]:
    """The sheets that say something of this system; none where images are no function of latents.

    Args:
        system: with the weights to sample, on any device; standing statistics are renewed, and left untruncated.
        class_counts: training images of each class.
        rows: of the run's grid, which shows so many classes already.
        seed: seed of the latents.
    """
    if not system.latent_shapes or system.sample_field != "images":
        return
    cut = truncations_sheet(system, class_counts, seed)
    if cut is not None:
        yield cut
    else:
        prepare(system, class_counts, seed=seed, truncation=None, device=device_of(system))
    path = interpolation_sheet(system, class_counts, seed)
    yield Drawn("interpolation", "Interpolation", "From left to right along great circles between two latents.", path)
    every = class_sheet(system, class_counts, seed) if len(class_counts) > rows else None
    if every is not None:
        note = f"One class per row{'' if len(class_counts) <= _MOST_CLASSES else ', an even choice'}; equal latents."
        yield Drawn("classes", "Classes", note, every)


def truncations_sheet(system: System, class_counts: Sequence[int], seed: int = 0) -> Drawn | None:
    """The same latents truncated to 0.5, to 1 and not at all, [3 * H, 8 * W, C]; None where that changes nothing.

    Of rows that are equal one is left: ψ = 1 of StyleGAN2 is no truncation.
    """
    drawn = draw_truncated(system, class_counts, row_labels(len(class_counts), _COLUMNS), _TRUNCATIONS, seed)
    rows = list(zip(_TRUNCATIONS, drawn, strict=True))
    kept = [one for one, after in itertools.pairwise(rows) if not torch.equal(one[1], after[1])] + rows[-1:]
    if len(kept) == 1:
        return None
    said = ", ".join("none" if truncation is None else f"{truncation:g}" for truncation, _ in kept)
    pixels = _laid_out(torch.cat([images for _, images in kept]), _COLUMNS)
    return Drawn("truncation", "Truncation", f"Rows: {said}; equal latents.", pixels)


def interpolation_sheet(system: System, class_counts: Sequence[int], seed: int = 0) -> NDArray[np.uint8]:
    """Images along four paths between two latents each, one path per row, [4 * H, 8 * W, C].

    Args:
        system: prepared for sampling.
        class_counts: training images of each class; the paths' classes take turns.
        seed: seed of the latents.
    """
    device = device_of(system)
    draws, shapes = generator(device, seed, "interpolation"), dict(system.latent_shapes)
    walked = next(iter(shapes))
    own = torch.from_numpy(row_labels(len(class_counts), _PATHS)).to(device).repeat_interleave(_COLUMNS)
    t = torch.linspace(0, 1, _COLUMNS, dtype=torch.float64, device=device).repeat(_PATHS)

    def ends(name: str) -> torch.Tensor:
        return torch.randn(_PATHS, *shapes[name], generator=draws, device=device).repeat_interleave(_COLUMNS, 0)

    latents = {name: ends(name) for name in shapes}
    latents[walked] = slerp(latents[walked].double(), ends(walked).double(), t).float()
    with torch.no_grad(), sampling_mode(system):
        return _laid_out(system.generate(latents, own), _COLUMNS)


def class_sheet(system: System, class_counts: Sequence[int], seed: int = 0) -> NDArray[np.uint8] | None:
    """The same eight latents in every class, or in an even choice of 32: [classes * H, 8 * W, C].

    None where the classes of the data are nothing to the system, as to an unconditional StyleGAN2.

    Args:
        system: prepared for sampling.
        class_counts: training images of each class.
        seed: seed of the latents.
    """
    device, drawn = device_of(system), []
    with torch.no_grad(), sampling_mode(system):
        for own in row_labels(len(class_counts), min(len(class_counts), _MOST_CLASSES)):
            labels = torch.full((_COLUMNS,), int(own), dtype=torch.int64, device=device)
            drawn.append(system.sample(labels, generator(device, seed, "classes")))
            if len(drawn) == 2 and torch.equal(*drawn):
                return None
    return _laid_out(torch.cat(drawn), _COLUMNS)


def _laid_out(images: torch.Tensor, columns: int) -> NDArray[np.uint8]:
    """Rows of images [N, C, H, W], made smaller where they are large: a sheet is looked at as a whole."""
    factor = images.shape[-1] // _EDGE
    small = torch.nn.functional.avg_pool2d(images.float(), factor) if factor > 1 else images
    return tile(to_uint8(small).cpu().numpy(), columns)
