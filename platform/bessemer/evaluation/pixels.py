"""Colours as features: no network, so that copies of training images are found by what anybody can see."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from bessemer.evaluation.extractors import check_images
from bessemer.evaluation.resize import resize_bicubic

__all__ = ["Pixels"]

_SIZE: Final = 32


class Pixels:
    """The extractor `pixels`; see :class:`bessemer.evaluation.extractors.Extractor`."""

    name: Final = "pixels"
    dimension: Final = 3 * _SIZE * _SIZE
    weights_sha256: Final = ""
    preprocessing: Final = "bicubic-antialias-float-32,x/255"
    head: Final = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        check_images(images)
        x = resize_bicubic(images.to(self._device), _SIZE).div_(255)
        return x.expand(-1, 3, -1, -1).flatten(1)
