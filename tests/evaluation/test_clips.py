"""Metrics of clips: frames, and how they follow one another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluation.conftest import MemoryData, ToySystem
from torch import Generator, Tensor

from bessemer.errors import EvaluationError
from bessemer.evaluation.evaluate import compare_images, evaluate_system
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.metrics import frechet_distance

METRICS = ["fdframes_pixels", "fdsteps_pixels"]


def clips(count: int, seed: int, frames: int = 5) -> np.ndarray:
    """[count, frames, 3, 8, 8]: stripes of random direction that drift by a random, constant step."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:8, :8] / 8
    angle, phase, speed = rng.uniform(0, 3, (3, count, 1, 1, 1))
    moment = np.arange(frames)[:, None, None]
    wave = np.sin(6 * (np.cos(angle) * x + np.sin(angle) * y) + phase + 0.3 * (0.5 + speed) * moment)
    return (128 + 100 * np.repeat(wave[:, :, None], 3, axis=2)).astype(np.uint8)


def values(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    sets = (MemoryData(images, f"{images.tobytes()[:999]!r}") for images in (generated, real))
    return {r.metric: r.value for r in compare_images(*sets, METRICS)}


def test_values_are_distances_of_frames_and_of_their_differences() -> None:
    generated, real = clips(30, 0), clips(40, 1)
    extractor = get_extractor("pixels")
    a, b = (
        np.stack([extractor.features(torch.from_numpy(clip)).double().numpy() for clip in side])
        for side in (generated, real)
    )
    found = values(generated, real)
    flat = [np.concatenate(list(side)) for side in (a, b)]
    assert found["fdframes_pixels"] == pytest.approx(frechet_distance(*flat), rel=1e-5)
    moves = [np.array([clip[t + 1] - clip[t] for clip in side for t in range(4)]) for side in (a, b)]
    assert found["fdsteps_pixels"] == pytest.approx(frechet_distance(*moves), rel=1e-5)


def test_frames_see_no_order_and_steps_do() -> None:
    generated, real = clips(60, 0), clips(60, 1)
    whole = values(generated, real)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = values(generated[:, order], real)
    assert shuffled["fdframes_pixels"] == pytest.approx(whole["fdframes_pixels"], rel=1e-6)
    assert shuffled["fdsteps_pixels"] > 1.5 * whole["fdsteps_pixels"]
    frozen = values(np.repeat(generated[:, :1], 5, axis=1), real)
    assert frozen["fdsteps_pixels"] > 1.5 * whole["fdsteps_pixels"]


class Drift(ToySystem):
    """A clip is one random colour that drifts."""

    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        first, step = torch.rand(2, len(labels), 1, 3, 1, 1, generator=generator)
        moment = torch.arange(5)[:, None, None, None]
        return (first + (step - 0.5) * moment / 4).expand(-1, -1, -1, 8, 8) - 0.5


def test_any_number_of_workers_computes_the_same_of_a_system(info, toy, workers, tmp_path: Path) -> None:
    found = []
    for world in (1, 2, 3):
        data = [MemoryData(clips(40, 1)) for _ in range(world)]

        def work(rank: int, group, world: int = world, data=data):
            return evaluate_system(
                Drift(toy().config),
                info(),
                data[rank],
                METRICS,
                samples=40,
                batch_size=32,
                group=group,
                cache_dir=tmp_path / f"{world}-{rank}",
            )

        found.append(workers(world, work)[0])
        again = workers(world, work)[0]  # from the cache
        assert [r.value for r in again] == [r.value for r in found[-1]]
        assert sum(d.reads for d in data) == 40
    for other in found[1:]:
        assert [r.value for r in other] == pytest.approx([r.value for r in found[0]], rel=1e-9)
    assert found[0][0].value > 1


def test_images_and_clips_have_metrics_of_their_own(memory_data) -> None:
    moving, still = MemoryData(clips(8, 0), "clips"), memory_data(8)
    with pytest.raises(
        EvaluationError, match="kid_pixels: the data set holds clips; use fdframes_pixels or fdsteps_pi"
    ):
        compare_images(moving, moving, ["kid_pixels"])
    with pytest.raises(EvaluationError, match="fdsteps_pixels: the data set holds images; use fd_pixels"):
        compare_images(still, still, ["fdsteps_pixels"])
