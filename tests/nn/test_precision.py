"""What is delicate runs in float32 as it is: no autocast, no TF32; and all is as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from bessemer.nn.convolutions import Conv2d
from bessemer.nn.precision import full_precision
from bessemer.systems.flow.glow import InvertibleConv

conv = torch.backends.cudnn.conv


@pytest.fixture(params=["tf32", "ieee"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    before, conv.fp32_precision = conv.fp32_precision, request.param
    yield request.param
    conv.fp32_precision = before


def test_switches_hold_inside_and_are_put_back(setting: str) -> None:
    """The switch of cuDNN is there without a GPU, too; what it does to a convolution only a GPU shows."""
    x = torch.ones(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(x):
            assert conv.fp32_precision == "ieee"
            assert not torch.is_autocast_enabled("cpu")
            with full_precision(x):
                assert conv.fp32_precision == "ieee"
            assert conv.fp32_precision == "ieee"
        assert torch.is_autocast_enabled("cpu")
    assert conv.fp32_precision == setting


def test_switches_are_put_back_after_an_error(setting: str) -> None:
    with contextlib.suppress(ValueError), full_precision(torch.ones(2)):
        raise ValueError
    assert conv.fp32_precision == setting


def test_there_is_nothing_to_switch_on_the_meta_device(setting: str) -> None:
    with full_precision(torch.ones(2, device="meta")):
        assert conv.fp32_precision == setting


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_mixtures_of_channels_are_computed_inside(monkeypatch: pytest.MonkeyPatch, setting: str, way: str) -> None:
    """Glow's 1x1 convolutions, both ways: else an image would not come back."""
    found = []
    compute = torch.nn.functional.conv2d

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        found.append((conv.fp32_precision, torch.is_autocast_enabled("cpu")))
        return compute(*arguments)

    layer = InvertibleConv(4)
    layer.init_weights(torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        getattr(layer, way)(torch.ones(1, 4, 2, 2))
    assert found == [("ieee", False)]
    assert conv.fp32_precision == setting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_convolutions_of_a_gpu_are_exact_inside() -> None:
    draws = torch.Generator().manual_seed(0)
    layer, x = Conv2d(256, 64), torch.randn(4, 256, 16, 16, generator=draws)
    torch.nn.init.normal_(layer.weight, generator=draws)
    exact = torch.nn.functional.conv2d(x.double(), layer.weight.double(), padding=1)
    with full_precision(x.cuda()):
        found = torch.nn.functional.conv2d(x.cuda(), layer.weight.cuda(), padding=1)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-3)  # TF32 is off by 1e-2
