"""Perceptual path lengths of generators whose paths are known."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluation.conftest import ToySystem
from torch import Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.evaluate import compare_images, evaluate_system
from bessemer.evaluation.lpips import get_lpips
from bessemer.evaluation.paths import mean_length, shrink_for_distance, slerp, step
from bessemer.evaluation.sampling import allocate_labels
from bessemer.systems.contract import SystemConfig
from bessemer.systems.registry import build
from bessemer.training.rng import generator

DIMENSION, SIDE = 6, 32


class Linear(ToySystem):
    """Images that are linear in z, or in the w that z is mapped to; a latent of noise adds the same to both ends."""

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config)
        draws = torch.Generator().manual_seed(0)
        self.basis = torch.randn(DIMENSION, 3 * SIDE * SIDE, generator=draws) / 100
        self.mix = torch.randn(DIMENSION, DIMENSION, generator=draws)

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"z": (DIMENSION,), "noise": (1, 1, 1)}

    def styles(self, latents: Mapping[str, Tensor], labels: Tensor) -> Mapping[str, Tensor]:
        return {"w": latents["z"] @ self.mix * (1 + labels[:, None]), "noise": latents["noise"]}

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:
        w = latents["w"] if "w" in latents else latents["z"]
        return (w @ self.basis).reshape(-1, 3, SIDE, SIDE) + latents["noise"] / 100


@pytest.fixture
def linear() -> Linear:
    return Linear(SystemConfig(resolution=SIDE, channels=3, classes=3))


def ends(labels: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """z at both ends and t, of all paths, as they are documented: by chunks of 32."""
    found = []
    for chunk in range(-(-len(labels) // 32)):
        n, draws = len(labels[chunk * 32 : chunk * 32 + 32]), generator("cpu", seed, "path", chunk)
        a, _, b = (torch.randn(n, *shape, generator=draws) for shape in ((DIMENSION,), (1, 1, 1), (DIMENSION,)))
        found.append((a.double(), b.double(), torch.rand(n, generator=draws).double()))
    a, b, t = (torch.cat(parts) for parts in zip(*found, strict=True))
    return a, b, t


def trimmed(lengths: np.ndarray) -> float:
    """Mean without what lies below the 1st or above the 99th percentile; of 40 values nothing or the outermost."""
    ordered = np.sort(lengths)
    low, high = ordered[int(np.floor(0.01 * 39))], ordered[int(np.ceil(0.99 * 39))]
    return float(np.mean([v for v in ordered if low <= v <= high]))


@pytest.mark.parametrize("metric", ["ppl-zend_pixels", "ppl-zfull_pixels", "ppl-wend_pixels", "ppl-wfull_pixels"])
def test_lengths_are_the_derivatives_along_the_paths(linear: Linear, info, memory_data, metric: str) -> None:
    """With linear images the derivative is known: `pixels` are colours in [0, 1], half of those in [-1, 1]."""
    [record] = evaluate_system(linear, info(), memory_data(40), [metric], samples=40, seed=3, truncation=0.5)
    labels = allocate_labels(info().class_counts, 40)
    a, b, t = ends(labels, 3)
    if "-w" in metric:
        scale = 1 + torch.from_numpy(labels).double()[:, None]
        velocity = (b - a) @ linear.mix.double() * scale
    else:
        t = t if "full" in metric else torch.zeros_like(t)
        t = t[:, None].requires_grad_()
        size_a, size_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
        angle = torch.acos((a / size_a * b / size_b).sum(1, keepdim=True))
        arc = (torch.sin((1 - t) * angle) * a / size_a + torch.sin(t * angle) * b / size_b) / torch.sin(angle)
        point = arc * ((1 - t) * size_a + t * size_b)
        velocity = torch.cat([torch.autograd.grad(p.sum(), t, retain_graph=True)[0] for p in point.unbind(1)], dim=1)
    lengths = (velocity @ linear.basis.double() / 2).square().sum(1)
    assert record.value == pytest.approx(trimmed(lengths.numpy()), rel=2e-3)
    assert (record.samples, record.reference_samples, record.truncation, record.extractor) == (40, 0, None, "pixels")
    assert "epsilon 1e-4" in record.estimator


def test_lengths_keep_their_place_among_other_metrics_and_workers_agree(
    linear: Linear, info, memory_data, workers, tmp_path: Path
) -> None:
    metrics = ["ppl-wfull_pixels", "kid_pixels", "ppl-zend_pixels"]
    linear.sample = lambda labels, draws, truncation=None: torch.zeros(len(labels), 3, SIDE, SIDE)  # type: ignore[method-assign]
    found = []
    for world in (1, 2, 3):

        def work(rank: int, group, world: int = world):
            return evaluate_system(
                linear,
                info(),
                memory_data(40),
                metrics,
                samples=150,
                batch_size=32,
                group=group,
                cache_dir=tmp_path / f"{world}-{rank}",
            )

        first, *others = workers(world, work)
        assert others == [[]] * (world - 1)
        found.append(first)
    assert [r.metric for r in found[0]] == metrics
    assert found[0][0].value > 1e-3
    for other in found[1:]:
        assert [r.value for r in other] == pytest.approx([r.value for r in found[0]], rel=1e-9)


def test_lpips_is_the_distance_that_its_name_says(lpips: Path, linear: Linear, info, memory_data) -> None:
    [record] = evaluate_system(linear, info(), memory_data(40), ["ppl-zend_lpips"], samples=20)
    labels = allocate_labels(info().class_counts, 20)
    first, second = step(linear, labels, 0, space="z", full=False, seed=0, device="cpu")
    far = first + (second - first) * 100  # the same step, but so large that single precision does not matter
    assert record.value == pytest.approx(mean_length(get_lpips().distance(first, far) / 1e-2**2).value, rel=0.05)
    assert record.extractor_sha256 == get_lpips().weights_sha256


def test_steps_are_not_rounded_to_bytes(linear: Linear) -> None:
    first, second = step(linear, np.zeros(4, dtype=np.int64), 0, space="z", full=True, seed=0, device="cpu")
    assert 0 < float((second - first).abs().max()) < 0.1


def test_arcs_are_those_of_the_sphere() -> None:
    a, b = (torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    found = slerp(a, b, t)
    assert torch.allclose(found[0], a[0])
    assert torch.allclose(found[4], b[4])
    unit = [side.flatten(1) / side.flatten(1).norm(dim=1, keepdim=True) for side in (a, b, found)]
    whole, part = (torch.acos((unit[0] * other).sum(1)) for other in unit[1:])
    assert torch.allclose(part, whole * t, atol=1e-7)


def test_faces_are_cut_out_and_large_images_averaged() -> None:
    images = torch.arange(512 * 512, dtype=torch.float32).reshape(1, 1, 512, 512)
    assert torch.equal(shrink_for_distance(images, face=True), images[:, :, 192:448, 128:384])
    expected = images.reshape(1, 1, 256, 2, 256, 2).mean((3, 5))
    assert torch.equal(shrink_for_distance(images, face=False), expected)
    small = torch.zeros(1, 3, 300, 300)
    assert shrink_for_distance(small, face=False) is small


def test_outliers_are_left_out() -> None:
    found = mean_length(np.array([1e9, 0.0, *[2.0] * 100, *[4.0] * 100]))
    assert found.value == pytest.approx(3)
    assert found.standard_error == pytest.approx(np.std([2, 4] * 100, ddof=1) / np.sqrt(200))


def test_stylegan2_walks_in_both_spaces(info, memory_data) -> None:
    config = {"resolution": 16, "channels": 3, "classes": 3}
    system = build("stylegan2", "tiny32", config)
    system.init_weights(torch.Generator().manual_seed(0))
    latents = {name: torch.randn(3, *shape) for name, shape in system.latent_shapes.items()}
    labels = torch.tensor([0, 2, 1])
    for network in system.networks().values():
        network.eval()
    with torch.no_grad():
        styles = system.styles(latents, labels)
        assert next(iter(styles)) == "w"
        assert torch.equal(system.generate(styles, labels, 0.7), system.generate(latents, labels, 0.7))
    records = evaluate_system(system, info(), memory_data(8), ["ppl-wend_pixels", "ppl-zend_pixels"], samples=8)
    assert all(np.isfinite(r.value) and r.value > 0 for r in records)


def test_what_cannot_be_walked_is_refused(toy, linear: Linear, info, memory_data, monkeypatch) -> None:
    data = memory_data(8)
    with pytest.raises(EvaluationError, match="ppl-zend_pixels: toy draws step by step"):
        evaluate_system(toy(), info(), data, ["ppl-zend_pixels"], samples=8)
    with pytest.raises(EvaluationError, match="images have none; leave it out"):
        compare_images(data, data, ["ppl-zend_pixels"])
    linear.basis[0, 0] = torch.nan
    with pytest.raises(EvaluationError, match="steps along paths: 8 of 8 hold NaN or infinity"):
        evaluate_system(linear, info(), data, ["ppl-zend_pixels"], samples=8)
    monkeypatch.delattr(Linear, "styles")
    with pytest.raises(EvaluationError, match="toy has no w, to which z is mapped; use ppl-zend_pixels"):
        evaluate_system(linear, info(), data, ["ppl-wend_pixels"], samples=8)
