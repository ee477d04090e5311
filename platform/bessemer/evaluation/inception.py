"""Inception-v3 of 2015-12-05: the network that the word FID means, and the variants that old numbers were made with.

The weights are brought, or fetched on request, by the person who wants them; their hash is checked before they are
loaded, so that no metric is computed with something else.

| extractor | clean-fid's mode | resizing |
|---|---|---|
| `inception` | `clean` | antialiased bicubic, in floats |
| `inception-tensorflow` | `legacy_tensorflow` | the network's own: bilinear, not antialiased |
| `inception-pytorch` | `legacy_pytorch` | bilinear, not antialiased; pytorch-fid's copy of the weights |

Heusel et al., NeurIPS 2017, arXiv:1706.08500; Parmar et al., CVPR 2022, arXiv:2104.11222.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bessemer.errors import EvaluationError
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.extractors import in_passes
from bessemer.evaluation.resize import resize_bicubic
from bessemer.evaluation.score import Head
from bessemer.evaluation.weights import check_weights, read_state

__all__ = ["Inception", "PytorchInception", "TensorflowInception"]

_SIZE: Final = 299
_DIMENSION: Final = 2048


class Inception:
    """The extractor `inception`; see :class:`bessemer.evaluation.extractors.Extractor`."""

    name: str = "inception"
    dimension: Final = _DIMENSION
    preprocessing: str = "clean-fid-bicubic-299,(x-128)/128"
    _resizes_inside = False

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.weights_sha256 = check_weights("inception", weights)
        self._device = device
        with warnings.catch_warnings():  # torch deprecates TorchScript, but the published weights are nothing else
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            network: Any = torch.jit.load(weights, map_location=device)  # type: ignore[no-untyped-call]
        self._network: Any = network.eval()
        self.head = _head(network)

    def features(self, images: Tensor) -> Tensor:
        return in_passes(self._features, images, self._device)

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(self._device)
        if self._resizes_inside:
            found = self._network(x.float().expand(-1, 3, -1, -1).contiguous(), return_features=True)
        else:
            x = resize_bicubic(x, _SIZE).expand(-1, 3, -1, -1).contiguous()
            found = self._network.layers(x.sub_(128).div_(128))
        return found.reshape(len(images), _DIMENSION).float()  # type: ignore[no-any-return]


class TensorflowInception(Inception):
    """The extractor `inception-tensorflow`: the whole published graph, which resizes its input."""

    name = "inception-tensorflow"
    preprocessing = "tensorflow-bilinear-299"
    _resizes_inside = True


class PytorchInception:
    """The extractor `inception-pytorch`, or one of its taps.

    Args:
        weights: pytorch-fid's state dict.
        device: where it runs.
        dimension: 2048, or 768 or 1280 for the channels after an earlier layer, averaged over the image.
    """

    preprocessing: Final = "bilinear-299,x/127.5-1"
    head = None

    def __init__(self, weights: Path, device: torch.device, dimension: int = _DIMENSION) -> None:
        self.name = "inception-pytorch" if dimension == _DIMENSION else f"inception-pytorch-{dimension}"
        self.dimension = dimension
        self.weights_sha256 = check_weights("inception-pytorch", weights)
        self._device = device
        self._network = pytorch_layers(read_state(weights), dimension).eval().requires_grad_(False).to(device)

    def features(self, images: Tensor) -> Tensor:
        return in_passes(self._features, images, self._device)

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(self._device).float()
        x = nn.functional.interpolate(x, (_SIZE, _SIZE), mode="bilinear", align_corners=False)
        maps: Tensor = self._network(x.expand(-1, 3, -1, -1).div(127.5).sub(1))
        return maps.mean((2, 3))


def pytorch_layers(state: dict[str, Tensor], dimension: int = _DIMENSION) -> nn.Sequential:
    """The convolutional part of pytorch-fid's Inception: torchvision's, with the blocks that differ replaced.

    Raises:
        EvaluationError: the weights are of another network, or packages are missing.
    """
    blocks: Any = import_cleanfid("inception_pytorch")
    torchvision: Any = blocks.torchvision
    network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name, channels, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(network, f"Mixed_{name}", blocks.FIDInceptionA(channels, pool_features=pooled))
    for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(network, f"Mixed_{name}", blocks.FIDInceptionC(768, channels_7x7=channels))
    network.Mixed_7b, network.Mixed_7c = blocks.FIDInceptionE_1(1280), blocks.FIDInceptionE_2(2048)
    try:
        network.load_state_dict(state)
    except RuntimeError as e:
        raise EvaluationError(f"extractor inception-pytorch: weights of another network ({e})") from None
    n, pool = network, nn.MaxPool2d(kernel_size=3, stride=2)
    layers = [n.Conv2d_1a_3x3, n.Conv2d_2a_3x3, n.Conv2d_2b_3x3, pool, n.Conv2d_3b_1x1, n.Conv2d_4a_3x3, pool]
    layers += [n.Mixed_5b, n.Mixed_5c, n.Mixed_5d, n.Mixed_6a, n.Mixed_6b, n.Mixed_6c, n.Mixed_6d, n.Mixed_6e]
    layers += [n.Mixed_7a] if dimension >= 1280 else []
    layers += [n.Mixed_7b, n.Mixed_7c] if dimension == _DIMENSION else []
    return nn.Sequential(*layers)


def _head(network: Any) -> Head | None:
    """The classifier without its bias, as the Inception Score has always been computed; None where there is none."""
    weight = dict(network.named_parameters()).get("output.weight")
    if weight is None:
        weight = dict(network.named_buffers()).get("output.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != _DIMENSION:
        return None
    return Head(weight.detach().float().cpu().numpy(), None)
