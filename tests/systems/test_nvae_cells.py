"""Cells against the paper's formulas, written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.init import init_weights
from bessemer.systems.autoencoding.nvae_cells import DecoderCell, EncoderCell, SqueezeExcitation


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bn(layer: Any, x: Tensor) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    gain, bias = (p.view(1, -1, 1, 1) for p in (layer.gain, layer.bias))
    return gain * (x - mean) / (var + layer.eps).sqrt() + bias


def _swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _se(layer: Any, x: Tensor) -> Tensor:
    h = torch.relu(x.mean((2, 3)) @ layer.squeeze.weight.T + layer.squeeze.bias)
    return x * torch.sigmoid(h @ layer.excite.weight.T + layer.excite.bias)[:, :, None, None]


def _prepared(cell: nn.Module) -> Any:
    cell = cell.double()
    init_weights(cell, _g(), "uniform")
    with torch.no_grad():
        for key, p in cell.named_parameters():
            if key.endswith(("gain", "bias")):
                p += torch.randn(p.shape, generator=_g(1), dtype=torch.float64) * 0.3
    return cell


X = torch.randn(3, 6, 8, 8, generator=_g(4), dtype=torch.float64)


@pytest.mark.parametrize("down", [False, True])
def test_encoder_cell_is_the_papers(down: bool) -> None:
    cell = _prepared(EncoderCell(6, 10 if down else 6, down=down))
    first, conv1, second, conv2 = cell.branch
    h = F.conv2d(_swish(_bn(first.norm, X)), conv1.effective_weight(), conv1.bias, stride=2 if down else 1, padding=1)
    h = F.conv2d(_swish(_bn(second.norm, h)), conv2.effective_weight(), conv2.bias, padding=1)
    skip = X
    if down:  # one 1×1 convolution for each pixel of a 2×2 square
        squares = _swish(X).unfold(2, 2, 2).unfold(3, 2, 2)
        corners = [squares[..., i, j] for i, j in ((0, 0), (1, 1), (0, 1), (1, 0))]
        skip = torch.cat(
            [F.conv2d(x, c.effective_weight(), c.bias) for x, c in zip(corners, cell.skip.convs, strict=True)], 1
        )
    torch.testing.assert_close(cell(X), skip + 0.1 * _se(cell.se, h))


@pytest.mark.parametrize("up", [False, True])
def test_decoder_cell_is_the_papers(up: bool) -> None:
    """Upsampling comes first here, and late in the cell, where it costs less."""
    cell = _prepared(DecoderCell(6, 4 if up else 6, expansion=3, up=up))
    norm, expand, first, _, depthwise, second, project, last = cell.branch
    h = F.interpolate(X, scale_factor=2) if up else X
    h = _swish(_bn(first.norm, F.conv2d(_bn(norm, h), expand.weight)))
    h = _swish(_bn(second.norm, F.conv2d(h, depthwise.weight, padding=2, groups=18)))
    h = _se(cell.se, _bn(last, F.conv2d(h, project.weight)))
    skip = X
    if up:
        wide = F.interpolate(X, scale_factor=2, mode="bilinear", align_corners=True)
        skip = F.conv2d(wide, cell.skip.conv.effective_weight())
    torch.testing.assert_close(cell(X), skip + 0.1 * h)


def test_squeeze_and_excitation_has_at_least_four_hidden_units() -> None:
    assert [SqueezeExcitation(n).squeeze.out_features for n in (8, 64, 160)] == [4, 4, 10]
