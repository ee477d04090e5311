"""LPIPS against its definition, and against torch-fidelity's, with the same random weights."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bessemer.errors import EvaluationError
from bessemer.evaluation import weights
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.lpips import Lpips, get_lpips


def pair(size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6, 3, size, size))
    y = (x + rng.normal(0, 30, x.shape)).clip(0, 255)
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y.astype(np.uint8))


def defined(x: torch.Tensor, y: torch.Tensor, place: Path) -> torch.Tensor:
    """Eq. 1 of the paper with the published shifts and scales, in float64."""
    network = torch.load(place / "vgg16-397923af.pth", weights_only=True)
    linear = torch.load(place / "vgg.pth", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[None, :, None, None]
    sides = [(2 * side.double() / 255 - 1 - shift) / scale for side in (x, y)]
    total, taken = torch.zeros(len(x), dtype=torch.float64), 0
    for layer in range(30):
        if layer in (4, 9, 16, 23):
            sides = [F.max_pool2d(side, 2, 2) for side in sides]
        elif f"features.{layer}.weight" in network:
            kernel, bias = (network[f"features.{layer}.{key}"].double() for key in ("weight", "bias"))
            sides = [F.relu(F.conv2d(side, kernel, bias, padding=1)) for side in sides]
        if layer in (2, 7, 14, 21, 28):
            a, b = (side / (side.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for side in sides)
            w = linear[f"lin{taken}.model.1.weight"].double()
            total += F.conv2d((a - b) ** 2, w).mean((1, 2, 3))
            taken += 1
    assert taken == 5
    return total


def test_the_distance_is_that_of_the_paper(lpips: Path) -> None:
    x, y = pair()
    found = get_lpips().distance(x, y)
    assert found.numpy() == pytest.approx(defined(x, y, lpips).numpy(), rel=1e-4)
    assert float(found.min()) > 0.01
    assert get_lpips().distance(x, x).eq(0).all()
    grey = get_lpips().distance(x[:, :1], y[:, :1])
    assert grey.numpy() == pytest.approx(defined(*(s[:, :1].expand(-1, 3, -1, -1) for s in (x, y)), lpips), rel=1e-4)


def test_torch_fidelity_finds_the_same(lpips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_cleanfid("fid")  # mends torchvision
    import torchvision
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    theirs = sys.modules["torch_fidelity.sample_similarity_lpips"]
    features = torchvision.models.vgg16(weights=None).features
    state = torch.load(lpips / "vgg16-397923af.pth", weights_only=True)
    features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=features))
    linear = torch.load(lpips / "vgg.pth", weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: linear)
    x, y = pair(32)
    with torch.no_grad():
        expected = SampleSimilarityLPIPS("lpips-vgg16")(x, y).flatten()
    assert get_lpips().distance(x, y).numpy() == pytest.approx(expected.numpy(), rel=1e-4)


def test_its_hash_names_both_files(lpips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_extractor("lpips").weights_sha256
    other = tmp_path / "vgg.pth"
    linear = torch.load(lpips / "vgg.pth", weights_only=True)
    torch.save({key: value * 2 for key, value in linear.items()}, other)
    with pytest.raises(EvaluationError, match=r"extractor lpips: .*vgg\.pth has sha256 \w+, but the metric is defined"):
        Lpips(lpips / "vgg16-397923af.pth", other, torch.device("cpu"))
    monkeypatch.setitem(weights.WEIGHTS, "lpips", replace(weights.WEIGHTS["lpips"], sha256=""))
    assert Lpips(lpips / "vgg16-397923af.pth", other, torch.device("cpu")).weights_sha256 != first


def test_files_of_other_networks_are_named(lpips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vgg16", "lpips"):
        monkeypatch.setitem(weights.WEIGHTS, name, replace(weights.WEIGHTS[name], sha256=""))
    network, linear, other = lpips / "vgg16-397923af.pth", lpips / "vgg.pth", tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(3, 3)}, other)
    with pytest.raises(EvaluationError, match="is not torchvision's VGG-16"):
        Lpips(other, linear, torch.device("cpu"))
    with pytest.raises(EvaluationError, match=r"no weights of 64 channels for stage 1; .*LPIPS 0.1 for VGG"):
        Lpips(network, other, torch.device("cpu"))
    with pytest.raises(EvaluationError, match=r"images of \[8, 8\] are smaller than 16 pixels"):
        get_lpips().features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_without_its_weights_it_says_how_to_get_them() -> None:
    with pytest.raises(EvaluationError, match=r"extractors get vgg16.*use ppl-zend_efflite0, or PSNR and SSIM"):
        get_extractor("lpips")
