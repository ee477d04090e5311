"""Classification accuracy: the classifiers against scikit-learn and against what they must learn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation import compute
from bessemer.evaluation.classify import ResNet8, accuracy, check_classes, fit_linear, fit_resnet
from bessemer.evaluation.evaluate import compare_images, evaluate_system
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.sampling import allocate_labels, draw_chunk, prepare, sampling_mode, to_uint8


def clusters(count: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes that overlap, one dimension of which is constant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.random.default_rng(99).normal(size=(3, 8))
    x = centres[labels] + spread * rng.normal(size=(count, 8))
    return np.concatenate([x * 7 + 3, np.full((count, 1), 5.0)], axis=1).astype(np.float32), labels.astype(np.int64)


def test_the_linear_classifier_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    (x, y), (test, true) = clusters(300, 0), clusters(2000, 1)
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std[std == 0] = 1
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=10_000).fit((x - mean) / std, y)
    expected = theirs.predict((test - mean) / std)
    found = fit_linear(x, y, 3)(test)
    assert (found == expected).mean() > 0.999
    assert 0.5 < (found == true).mean() < 0.95  # a task that can be got wrong
    order = np.random.default_rng(2).permutation(len(x))
    assert np.array_equal(fit_linear(x[order], y[order], 3)(test), found)


def test_classes_without_images_are_never_said() -> None:
    x, y = clusters(300, 0)
    classify = fit_linear(x[y > 0], y[y > 0], 3)
    assert set(classify(x)) == {1, 2}
    with pytest.raises(EvaluationError, match="3 classes, of which 1 are among the generated"):
        check_classes(y[y == 2], 3)


def test_accuracy_counts_by_class() -> None:
    found = accuracy(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0]), 4)
    assert found.value == 0.6
    assert found.by_class == (0.5, pytest.approx(2 / 3), None, None)
    assert found.standard_error == pytest.approx((0.6 * 0.4 / 5) ** 0.5)


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stripes across or along, on a random colour: means and spreads of the pixels say nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    wave = np.sin(np.arange(32)[None] / 2 + rng.uniform(0, 6, (count, 1)))
    field = np.where(labels[:, None, None] == 0, wave[:, :, None], wave[:, None, :])
    images = 0.5 + 0.2 * np.broadcast_to(field[:, None], (count, 3, 32, 32)) + rng.uniform(-0.2, 0.2, (count, 3, 1, 1))
    return images.reshape(count, -1).astype(np.float32), labels.astype(np.int64)


def test_the_resnet_learns_what_no_linear_classifier_sees() -> None:
    (x, y), (test, true) = pictures(200, 0), pictures(200, 1)
    classify = fit_resnet(x, y, 2, seed=1, steps=30)
    assert (classify(test) == true).mean() > 0.95
    assert (fit_linear(x, y, 2)(test) == true).mean() < 0.8
    assert np.array_equal(fit_resnet(x, y, 2, seed=1, steps=3)(test), fit_resnet(x, y, 2, seed=1, steps=3)(test))


def test_the_resnet_has_the_papers_shape() -> None:
    network = ResNet8(10)
    convolutions = 3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64
    norms = 2 * (16 + 2 * 16 + 2 * 32 + 2 * 64)
    assert sum(p.numel() for p in network.parameters()) == 9 * convolutions + norms + 64 * 10 + 10
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_score_is_of_generated_images_and_those_held_out(toy, info, memory_data, workers, tmp_path: Path) -> None:
    data, held_out = memory_data(40), memory_data(50)
    found = []
    for world in (1, 2):

        def work(rank: int, group, world: int = world):
            return evaluate_system(
                toy(),
                info(),
                data,
                ["cas_pixels", "kid_pixels"],
                samples=64,
                held_out=held_out,
                batch_size=32,
                group=group,
                cache_dir=tmp_path / f"{world}-{rank}",
            )

        found.append(workers(world, work)[0])
    (record, kid), (again, _) = found
    assert record.value == pytest.approx(again.value, rel=1e-9)
    assert (record.reference_samples, kid.reference_samples) == (50, 40)
    assert record.higher_is_better
    assert record.details["classes"].keys() == {"a", "b", "c"}

    system, extractor = toy(), get_extractor("pixels")
    labels = allocate_labels(info().class_counts, 64)
    prepare(system, info().class_counts, seed=0, truncation=None, device="cpu")
    with sampling_mode(system):
        drawn = [draw_chunk(system, labels, c, seed=0, truncation=None, device="cpu") for c in range(2)]
    classify = fit_linear(extractor.features(to_uint8(torch.cat(drawn))).numpy(), labels, 3)
    real = extractor.features(torch.from_numpy(held_out.images)).numpy()
    assert record.value == np.mean(classify(real) == held_out.labels)


def test_the_resnet_is_asked_by_its_name(memory_data, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fit(features, labels, classes, *, seed, device):
        asked.append((features.shape, classes, seed))
        return lambda images: np.zeros(len(images), dtype=np.int64)

    monkeypatch.setattr(compute, "fit_resnet", fit)
    [record] = compare_images(memory_data(30), memory_data(60), ["cas-resnet_pixels"])
    assert asked == [((30, 3072), 3, 0)]
    assert record.value == pytest.approx(1 / 3)
    assert "ResNet-8" in record.estimator


def test_sets_of_other_classes_are_refused(memory_data) -> None:
    a, b = memory_data(30), memory_data(40)
    b.manifest.classes = ("a", "b", "d")
    with pytest.raises(EvaluationError, match=r"classification accuracy: the two sets have different classes \(c, d\)"):
        compare_images(a, b, ["cas_pixels"])
