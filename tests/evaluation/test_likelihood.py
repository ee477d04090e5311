import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation.likelihood import evaluate_likelihood
from bessemer.evaluation.names import split_metrics
from bessemer.systems.autoencoding.nvae import NVAE
from bessemer.systems.contract import Batch
from bessemer.systems.registry import build
from bessemer.training.rng import generator


@pytest.fixture
def small() -> NVAE:
    fields = {"resolution": 16, "width": 4, "groups": (2,), "latent_channels": 2, "components": 2, "channels": 3}
    system = build("nvae", "tiny32", fields)
    assert isinstance(system, NVAE)
    system.init_weights(torch.Generator().manual_seed(0))
    return system


@pytest.fixture
def data(memory_data) -> Any:
    found = memory_data(70)
    found.labels = np.zeros(70, dtype=np.int64)
    return found


def test_bits_per_dim_of_the_documented_images(small: NVAE, info, data) -> None:
    [record] = evaluate_likelihood(small, info(), data, ["bits_per_dim"], samples=70, importance_samples=3, seed=4)
    small.vae.eval()
    nats = []
    for chunk in range(3):
        images = torch.from_numpy(data.images[32 * chunk : 32 * chunk + 32]).float() / 127.5 - 1
        batch = Batch(images, torch.zeros(len(images), dtype=torch.int64))
        nats.append(small.log_likelihood(batch, generator("cpu", 4, "likelihood", chunk), 3))
    bits = -torch.cat(nats).numpy() / (math.log(2) * 3 * 16 * 16)
    assert record.value == pytest.approx(bits.mean())
    assert record.standard_error == pytest.approx(bits.std(ddof=1) / math.sqrt(70))
    assert (record.samples, record.importance_samples, record.seed) == (70, 3, 4)
    assert record.preprocessing == "8 bits, not dequantised, 3 importance samples"
    assert record.weights == "ema half_life_kimg=10.0 rampup=0.05"
    other = evaluate_likelihood(small, info(), data, ["bits_per_dim"], samples=70, importance_samples=2, seed=4)[0]
    assert other.reference_hash != record.reference_hash


def test_modes_and_statistics_stay(small: NVAE, info, data) -> None:
    small.vae.train()
    before = {k: v.clone() for k, v in small.vae.state_dict().items()}
    evaluate_likelihood(small, info(), data, ["bits_per_dim"], samples=10)
    assert small.vae.training
    assert all(torch.equal(v, before[k]) for k, v in small.vae.state_dict().items())


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_workers_computes_the_same(small: NVAE, info, data, world: int) -> None:
    [alone] = evaluate_likelihood(small, info(), data, ["bits_per_dim"], samples=70)
    shares: list[Any] = []

    class Reached(Exception):  # noqa: N818  # a way out, no error
        pass

    def leave(value: Any) -> list[Any]:
        shares.append(value)
        raise Reached

    def on(rank: int, gather: Any) -> Any:
        names = ["bits_per_dim"]
        group = SimpleNamespace(rank=rank, size=world, gather=gather)
        return evaluate_likelihood(small, info(), data, names, samples=70, group=group)

    for rank in range(1, world):  # four workers have three chunks: the last gathers nothing
        with pytest.raises(Reached):
            on(rank, leave)
    [record] = on(0, lambda own: [own, *shares])
    assert record.value == alone.value
    assert on(1, lambda own: [own, *shares, alone_share(small, info, data)]) == []


def alone_share(small: NVAE, info: Any, data: Any) -> Any:
    found: list[Any] = []
    group = SimpleNamespace(rank=0, size=1, gather=lambda own: found.append(own) or [own])
    evaluate_likelihood(small, info(), data, ["bits_per_dim"], samples=70, group=group)
    return found[0]


def test_what_has_no_likelihood_is_refused(small: NVAE, toy, info, data) -> None:
    with pytest.raises(EvaluationError, match=r"bits_per_dim needs a likelihood, and toy has none"):
        evaluate_likelihood(toy(), info(), data, ["bits_per_dim"], samples=10)
    with torch.no_grad():
        small.vae.image[1].bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(
        EvaluationError, match=r"likelihoods: 10 of 10 hold NaN or infinity .* The weights of vae are not finite"
    ):
        evaluate_likelihood(small, info(), data, ["bits_per_dim"], samples=10)
    assert evaluate_likelihood(toy(), info(), data, [], samples=10) == []


def test_metrics_are_split_by_what_they_need() -> None:
    assert split_metrics(["fid", "psnr", "bits_per_dim", "kid_efflite0"]) == (
        ["fid", "kid_efflite0"],
        ["bits_per_dim"],
        ["psnr"],
    )
