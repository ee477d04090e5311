"""LPIPS: how different two images look, by the features of VGG-16 and weights that people's judgements have set.

Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018, arXiv:1801.03924,
version 0.1. The network is torchvision's VGG-16, whose last three layers it does not need; the weights of the channels
are the authors' file. Both are brought, or fetched on request, and their hashes are checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import in_passes
from bessemer.evaluation.weights import check_weights, find_weights, read_state

__all__ = ["Lpips", "get_lpips"]

_STAGES: Final = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each stage; features are taken after its last one, and stages are halved in between."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS: Final = 1e-10
_LEAST: Final = 2 ** (len(_STAGES) - 1)
_PASS: Final = 4  # the features of one image of 256 pixels take 32 MB


class Lpips:
    """The extractor `lpips`: features whose squared distance is LPIPS.

    Args:
        network: torchvision's VGG-16, `vgg16-397923af.pth`.
        linear: the authors' weights of its channels, `vgg.pth` of version 0.1.
        device: where it runs.

    Raises:
        EvaluationError: another file, or one that is damaged.
    """

    name: Final = "lpips"
    dimension: Final = 0
    preprocessing: Final = "own size,x/127.5-1"
    head: Final = None

    def __init__(self, network: Path, linear: Path, device: torch.device) -> None:
        hashes = [check_weights(name, path) for name, path in (("vgg16", network), ("lpips", linear))]
        self.weights_sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
        self._device = device
        self._stages = _stages(read_state(network), network).eval().requires_grad_(False).to(device)
        self._channels = [w.to(device) for w in _channel_weights(read_state(linear), linear)]
        shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (_SHIFT, _SCALE))
        self._shift, self._scale = (1 + shift) * 127.5, scale * 127.5

    def features(self, images: Tensor) -> Tensor:
        if images.ndim == 4 and min(images.shape[2:]) < _LEAST:
            raise EvaluationError(f"lpips: images of {list(images.shape[2:])} are smaller than {_LEAST} pixels.")
        return in_passes(self._features, images, self._device, _PASS)

    def _features(self, images: Tensor) -> Tensor:
        x = ((images.to(self._device).float() - self._shift) / self._scale).expand(-1, 3, -1, -1)
        found = []
        for stage, weights in zip(self._stages, self._channels, strict=True):
            x = stage(x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + _EPS)
            found.append((unit * (weights / x[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(found, dim=1)

    def distance(self, images: Tensor, originals: Tensor) -> Tensor:
        """[N] LPIPS of pairs of images [N, 1 or 3, H, W]: 0 for equal ones.

        Eq. 1: squared differences of features of unit length, weighted by channel, averaged over the image and summed
        over the layers.

        Raises:
            EvaluationError: images of another type, or smaller than 16 pixels.
        """
        parts = zip(torch.split(images, _PASS), torch.split(originals, _PASS), strict=True)
        return torch.cat([(self.features(x) - self.features(y)).square().sum(1) for x, y in parts])


def get_lpips(device: torch.device | str = "cpu") -> Lpips:
    """The perceptual distance, loaded once per process and device.

    Raises:
        EvaluationError: its weights are missing.
    """
    return _load(find_weights("vgg16"), find_weights("lpips"), torch.device(device))


@lru_cache(maxsize=2)
def _load(network: Path, linear: Path, device: torch.device) -> Lpips:
    return Lpips(network, linear, device)


def _stages(state: Mapping[str, Tensor], path: Path) -> nn.ModuleList:
    """The five stages, each from the maximum pooling before it to the last ReLU."""
    stages, at, before = nn.ModuleList(), 0, 3
    for channels, convolutions in _STAGES:
        layers: list[nn.Module] = []
        if at:
            layers.append(nn.MaxPool2d(2))
            at += 1
        for _ in range(convolutions):
            conv = nn.Conv2d(before, channels, 3, padding=1)
            try:
                conv.load_state_dict({key: state[f"features.{at}.{key}"] for key in ("weight", "bias")})
            except (KeyError, RuntimeError) as e:
                raise EvaluationError(f"extractor lpips: {path} is not torchvision's VGG-16 ({e})") from None
            layers += [conv, nn.ReLU()]
            at, before = at + 2, channels
        stages.append(nn.Sequential(*layers))
    return stages


def _channel_weights(state: Mapping[str, Tensor], path: Path) -> Iterator[Tensor]:
    """[channels, 1, 1] of each stage."""
    for number, (channels, _) in enumerate(_STAGES):
        weight = state.get(f"lin{number}.model.1.weight")
        if weight is None or weight.shape != (1, channels, 1, 1):
            raise EvaluationError(
                f"extractor lpips: {path} holds no weights of {channels} channels for stage {number + 1}; it is not "
                "that of LPIPS 0.1 for VGG."
            )
        yield weight[0].clamp(min=0)  # non-negative by the authors' training
