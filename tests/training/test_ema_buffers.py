"""What is no parameter fits the averaged weights: BatchNorm statistics and spectral-norm vectors of snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bessemer.evaluation.sampling import SAMPLE_CHUNK, allocate_labels, recompute_batch_norm
from bessemer.nn.norm import BatchNorm
from bessemer.nn.spectral import SpectralNorm
from bessemer.nn.update_state import begin_update, end_update
from bessemer.systems.contract import System
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, load_snapshot, sampled_state, save_snapshot, system_of
from bessemer.training.rng import generator

FIELDS = {
    "generator_width": 4, "discriminator_width": 2, "latent_dim": 8, "shared_dim": 3, "standing_passes": 0,
    "hierarchical": False, "generator_attention": (),
}  # fmt: skip
COUNTS = [5] * 10


@pytest.fixture(scope="module")
def averaged() -> tuple[System, SnapshotInfo]:
    """BigGAN after 60 updates that move its weights: the mean of the last 30 weights, the buffers of the end."""
    system = build("biggan", "tiny32", FIELDS)
    system.init_weights(torch.Generator().manual_seed(1))
    network, draws = system.networks()["generator"], torch.Generator().manual_seed(2)
    network.train()
    sums: dict[str, Tensor] = {k: torch.zeros_like(p) for k, p in network.named_parameters()}
    with torch.no_grad():
        for step in range(60):
            begin_update([network])
            system.sample(torch.randint(10, (16,), generator=draws), draws)
            end_update([network])
            for key, p in network.named_parameters():
                p += 0.02 * torch.randn(p.shape, generator=draws)
                sums[key] += p / 30 if step >= 30 else 0
        for key, p in network.named_parameters():
            p.copy_(sums[key])
    config = system.config.model_dump(mode="json")
    info = SnapshotInfo("biggan", config, 0, {}, 0, "none", [str(i) for i in range(10)], COUNTS)
    return system, info


def fresh(averaged: tuple[System, SnapshotInfo]) -> System:
    system, info = averaged
    return system_of(info, {k: v.clone() for k, v in sampled_state(system).items()})


def norms(system: System) -> dict[str, BatchNorm]:
    return {k: m for k, m in system.networks()["generator"].named_modules() if isinstance(m, BatchNorm)}


def test_recomputed_statistics_are_those_of_the_averaged_weights(averaged: tuple[System, SnapshotInfo]) -> None:
    """Each layer's statistics against those of what the layer was given, collected from outside."""
    system, witness = fresh(averaged), fresh(averaged)
    copied = {k: m.running_mean.clone() for k, m in norms(system).items()}
    recompute_batch_norm(system, COUNTS, seed=3, device="cpu")

    seen: dict[str, list[tuple[Tensor, Tensor]]] = {k: [] for k in norms(witness)}
    for key, layer in norms(witness).items():

        def look(_: nn.Module, given: tuple[Tensor, ...], key: str = key) -> None:
            values = given[0].transpose(0, 1).flatten(1)
            seen[key].append((values.mean(1), values.var(1)))

        layer.register_forward_pre_hook(look)
    witness.networks()["generator"].train()
    labels, draws = torch.from_numpy(allocate_labels(COUNTS, 64 * SAMPLE_CHUNK)), generator("cpu", 3, "batch norm")
    for part in labels.split(SAMPLE_CHUNK):
        witness.sample(part, draws)
    for key, layer in norms(system).items():
        assert len(seen[key]) == 64
        means, variances = (torch.stack(column).mean(0) for column in zip(*seen[key], strict=True))
        torch.testing.assert_close(layer.running_mean, means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, variances, rtol=1e-4, atol=1e-5)
    assert any((copied[k] - m.running_mean).abs().max() > 1e-2 for k, m in norms(system).items())


def test_recomputing_changes_nothing_but_batch_norm(averaged: tuple[System, SnapshotInfo]) -> None:
    system = fresh(averaged)
    before = {k: v.clone() for k, v in sampled_state(system).items()}
    state = torch.get_rng_state()
    recompute_batch_norm(system, COUNTS, seed=3, device="cpu")
    changed = {k for k, v in sampled_state(system).items() if not torch.equal(v, before[k])}
    assert changed == {f"generator.{k}.{what}" for k in norms(system) for what in ("running_mean", "running_var")}
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m.training for m in system.networks()["generator"].modules())


def test_copied_spectral_vectors_fit_averaged_weights(averaged: tuple[System, SnapshotInfo]) -> None:
    """σ from the vector of the live weights is just below the largest singular value of the averaged ones."""
    layers = [m for m in fresh(averaged).networks()["generator"].modules() if isinstance(m, SpectralNorm)]
    assert len(layers) > 5
    for layer in layers:
        true = torch.linalg.svdvals(layer.weight.flatten(1))[0]
        assert 0.9 * true < layer.sigma() <= 1.0001 * true


@pytest.mark.parametrize("how", ["copied", "recomputed"])
def test_a_snapshot_samples_with_its_own_buffers(
    averaged: tuple[System, SnapshotInfo], tmp_path: Path, how: str
) -> None:
    system = fresh(averaged)
    if how == "recomputed":
        recompute_batch_norm(system, COUNTS, seed=3, device="cpu")
    save_snapshot(tmp_path / "it", sampled_state(system), averaged[1])
    loaded, _ = load_snapshot(tmp_path / "it")
    labels = torch.arange(10).repeat(8)
    drawn = [s.sample(labels, torch.Generator().manual_seed(4)) for s in (system, loaded)]
    assert torch.equal(*drawn)


def test_recomputed_statistics_normalise(averaged: tuple[System, SnapshotInfo]) -> None:
    """In evaluation mode channels leave the last normalisation with variance 1, which copied statistics miss."""
    off = {}
    for how in ("copied", "recomputed"):
        system = fresh(averaged)
        if how == "recomputed":
            recompute_batch_norm(system, COUNTS, seed=3, device="cpu")
        left: list[Tensor] = []
        norm = system.networks()["generator"].norm
        assert isinstance(norm, nn.Module)
        norm.register_forward_hook(
            lambda m, _, out, left=left: left.append((out - m.bias[:, None, None]) / m.gain[:, None, None])
        )
        system.sample(torch.arange(10).repeat(20), torch.Generator().manual_seed(5))
        off[how] = left[0].transpose(0, 1).flatten(1).var(1).log().abs().max().item()
    assert off["recomputed"] < 0.1
    assert off["copied"] > 2 * off["recomputed"]
