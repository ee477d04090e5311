"""Feature extractors: from uint8 images to vectors, always with the weights' hash and the name of the preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.names import EXTRACTORS
from bessemer.evaluation.score import Head

__all__ = ["Extractor", "check_images", "exact_arithmetic", "get_extractor", "in_passes"]

_CPU_PASS: Final = 16  # larger passes leave the caches and cost page faults, most of all on a busy machine


class Extractor(Protocol):
    """A frozen network that turns images into features."""

    @property
    def name(self) -> str:
        """Key of :data:`bessemer.evaluation.names.EXTRACTORS`."""

    @property
    def dimension(self) -> int:
        """Length of a feature vector; 0 where it depends on the size of the images."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights file; empty where there is none."""

    @property
    def preprocessing(self) -> str:
        """Name of resizing and scaling; changes whenever their result does."""

    @property
    def head(self) -> Head | None:
        """Its classifier, where it has one."""

    def features(self, images: Tensor) -> Tensor:
        """Features [N, dimension] float32 of [N, 1 or 3, H, W] images, on the extractor's device.

        Args:
            images: uint8; or float32 of 0 to 255, where 8 bits are too coarse.

        Raises:
            EvaluationError: images of another type or shape.
        """


def get_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor, loaded once per process and device.

    Raises:
        EvaluationError: unknown name, or its package or weights are missing; the message says how to get them.
    """
    if name not in EXTRACTORS:
        raise EvaluationError(f"extractor {name!r}: there is none of this name; known: {', '.join(EXTRACTORS)}.")
    if name in ("efflite0", "pixels"):
        return _without_weights(name, torch.device(device))
    if name == "lpips":
        from bessemer.evaluation.lpips import get_lpips

        return get_lpips(device)
    from bessemer.evaluation.weights import find_weights

    family = "inception-pytorch" if name.startswith("inception-pytorch") else name.removesuffix("-tensorflow")
    return _with_weights(name, find_weights(family), torch.device(device))


@lru_cache(maxsize=4)
def _without_weights(name: str, device: torch.device) -> Extractor:
    if name == "pixels":
        from bessemer.evaluation.pixels import Pixels

        return Pixels(device)
    from bessemer.evaluation.efflite0 import EffLite0

    return EffLite0(device)


@lru_cache(maxsize=4)
def _with_weights(name: str, weights: Path, device: torch.device) -> Extractor:
    if name.startswith("inception-pytorch"):
        from bessemer.evaluation.inception import PytorchInception

        tap = name.removeprefix("inception-pytorch").removeprefix("-")
        return PytorchInception(weights, device, int(tap or 2048))
    if name.startswith("inception"):
        from bessemer.evaluation.inception import Inception, TensorflowInception

        return Inception(weights, device) if name == "inception" else TensorflowInception(weights, device)
    from bessemer.evaluation.vit import Clip, DinoV2

    return DinoV2(weights, device) if name == "dinov2" else Clip(weights, device)


def check_images(images: Tensor) -> None:
    """Refuse what is not [N, 1 or 3, H, W] of 0 to 255; extractors repeat a single channel to three.

    Raises:
        EvaluationError: another type, shape or scale.
    """
    if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise EvaluationError(
            f"images: {images.dtype} of shape {list(images.shape)}, but extractors take uint8 [N, 1 or 3, H, W]."
        )
    if images.is_floating_point() and images.numel() and (low := float(images.min())) < 0:
        raise EvaluationError(f"images: hold {low:.4g}, but floats must be scaled to 0 to 255 as bytes are.")


@torch.no_grad()
def in_passes(
    extract: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, most: int | None = None
) -> Tensor:
    """Features of images by `extract`, which gets some of them at a time.

    Args:
        extract: features [n, dimension] of images [n, 1 or 3, H, W].
        images: [N, 1 or 3, H, W] uint8, or float32 of 0 to 255.
        device: where it computes.
        most: images per pass; unset for as many as the caches hold on the CPU, and all of them on a GPU.

    Raises:
        EvaluationError: as :func:`check_images`.
    """
    check_images(images)
    if most is None:
        most = _CPU_PASS if device.type == "cpu" else len(images)
    with exact_arithmetic(device):
        return torch.cat([extract(part) for part in torch.split(images, max(most, 1))])


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Full fp32 and repeatable kernels on a GPU, whose defaults (TF32) would move the third digit of a distance."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
