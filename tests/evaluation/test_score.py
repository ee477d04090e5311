import math

import numpy as np
import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.score import Head, class_probabilities, inception_score


def drawn(n: int, classes: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(n, classes)) * 2
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_probabilities_are_those_of_torch() -> None:
    rng = np.random.default_rng(1)
    x, w, b = (rng.normal(size=s).astype(np.float32) * 10 for s in ((7, 5), (4, 5), (4,)))
    for bias in (None, b):
        linear = torch.nn.functional.linear(
            torch.from_numpy(x).double(),
            torch.from_numpy(w).double(),
            None if bias is None else torch.from_numpy(b).double(),
        )
        np.testing.assert_allclose(class_probabilities(x, Head(w, bias)), linear.softmax(1).numpy(), rtol=1e-10)


def test_score_is_that_of_the_paper() -> None:
    p = drawn(43, 6)
    scores = []
    for part in np.array_split(p, 4):
        marginal = [sum(row[c] for row in part) / len(part) for c in range(6)]
        kl = [sum(row[c] * math.log(row[c] / marginal[c]) for c in range(6)) for row in part]
        scores.append(math.exp(sum(kl) / len(kl)))
    found = inception_score(p, splits=4)
    assert found.value == pytest.approx(sum(scores) / 4, rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(scores, ddof=1) / 2, rel=1e-12)


def test_score_equals_torch_fidelity() -> None:
    import_cleanfid("fid")  # mends torchvision
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    found = inception_score(logits.softmax(1).numpy())
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_score_goes_from_one_to_the_number_of_classes() -> None:
    assert inception_score(np.full((100, 8), 1 / 8)).value == pytest.approx(1)
    assert inception_score(np.eye(8)[np.arange(160) % 8]).value == pytest.approx(8)  # with exact zeros


def test_too_few_images_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"19 are too few .* use at least 20"):
        inception_score(drawn(19, 3))
