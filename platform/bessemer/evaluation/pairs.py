"""A picture of the memorisation check: generated images beside the real ones that they are nearest to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bessemer.evaluation.evaluate import Balance, sampled_counts
from bessemer.evaluation.grid import tile
from bessemer.evaluation.inputs import Inputs
from bessemer.evaluation.records import SampledWeights
from bessemer.evaluation.resize import resize_bicubic
from bessemer.evaluation.sampling import SAMPLE_CHUNK, allocate_labels, draw_chunk, prepare, sampling_mode, to_uint8
from bessemer.systems.contract import System

__all__ = ["draw_one", "pair_figure"]

Read = Callable[[int], NDArray[np.uint8]]
"""An image [C, H, W] by its number."""


def pair_figure(pairs: Sequence[dict[str, Any]], generated: Read, real: Read, columns: int = 4) -> NDArray[np.uint8]:
    """Pairs side by side, generated left and real right, the most suspicious first.

    Args:
        pairs: `details["pairs"]` of a record of a memorisation check.
        generated: reads a generated image.
        real: reads a real one.
        columns: pairs in a row.

    Returns:
        [H, W, 3] pixels; images of other sizes are resized to the largest edge.
    """
    images = [image for pair in pairs for image in (generated(pair["image"]), real(pair["real"]))]
    edge = max(max(image.shape[1:]) for image in images)
    squares = [resize_bicubic(torch.from_numpy(image)[None], edge).expand(-1, 3, -1, -1) for image in images]
    return tile(torch.cat(squares).round().to(torch.uint8).numpy(), 2 * columns)


def draw_one(
    system: System,
    info: SampledWeights,
    samples: int,
    *,
    seed: int,
    truncation: float | None,
    balance: Balance,
    device: torch.device | str,
    inputs: Inputs | None = None,
) -> Read:
    """Draws images of an evaluation again by their numbers: each is a function of its chunk's generator and input."""
    counts = sampled_counts(info.class_counts, balance)
    labels = allocate_labels(counts, samples) if inputs is None else inputs.labels
    protocol: dict[str, Any] = {"seed": seed, "truncation": truncation, "device": device, "inputs": inputs}
    prepare(system, counts, seed=seed, truncation=truncation, device=device)

    def read(number: int) -> NDArray[np.uint8]:
        with sampling_mode(system):
            chunk = draw_chunk(system, labels, number // SAMPLE_CHUNK, **protocol)
        image: NDArray[np.uint8] = to_uint8(chunk[number % SAMPLE_CHUNK]).cpu().numpy()
        return image

    return read
