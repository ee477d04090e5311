"""Glow: volumes against autograd, inverses, data-dependent initialisation, and sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.systems.tiny import random_batch, tiny_system
from torch import nn

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.nn.data_init import ActNorm, initialising
from bessemer.nn.likelihoods import quantise
from bessemer.orchestration.worker import _init_from_data
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch
from bessemer.systems.flow.glow import Coupling, Glow, InvertibleConv
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


COUPLINGS: list[dict[str, Any]] = [{}, {"least_scale": 0.5}, {"affine": False}]


def rough(**fields: Any) -> Glow:
    """A flow on 4×4×3 in float64, all of whose weights are away from their start, and whose noise is of variance 1."""
    system = build("glow", "tiny8", {"resolution": 4, "channels": 3, "steps": 2, "width": 8, **fields})
    assert isinstance(system, Glow)
    system.init_weights(g())
    system.flow.double()
    with torch.no_grad():
        for i, (name, p) in enumerate(system.flow.named_parameters()):
            p += (0.02 if "prior" in name else 0.1) * torch.randn(p.shape, generator=g(i), dtype=torch.float64)
    with initialising(system.flow):
        system.flow(torch.rand(64, 3, 4, 4, generator=g(1), dtype=torch.float64) - 0.5)
    return system


@pytest.mark.parametrize("fields", COUPLINGS)
def test_log_density_against_the_jacobian(fields: dict[str, Any]) -> None:
    """log p(x) = log N(noise; 0, I) + log|det ∂noise/∂x|, the latter by autograd."""
    system = rough(**fields)
    x = torch.rand(1, 3, 4, 4, generator=g(), dtype=torch.float64) - 0.5

    def noise(flat: torch.Tensor) -> torch.Tensor:
        return torch.cat([z.flatten() for z in system.flow(flat.view(1, 3, 4, 4))[0]])

    jacobian = torch.autograd.functional.jacobian(noise, x.flatten())
    z = noise(x.flatten())
    expected = -0.5 * (z.square() + math.log(2 * math.pi)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(system.flow(x)[1][0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fields", COUPLINGS)
@torch.no_grad()
def test_inverse(fields: dict[str, Any]) -> None:
    """Of images and of noise, in both precisions."""
    system = rough(**fields)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        flow = system.flow.to(dtype)
        x = (torch.rand(3, 3, 4, 4, generator=g(), dtype=torch.float64) - 0.5).to(dtype)
        noise, _ = flow(x)
        torch.testing.assert_close(flow.inverse(noise), x, rtol=0, atol=tolerance)
        noise = [torch.randn(z.shape, generator=g(i), dtype=dtype) for i, z in enumerate(noise)]
        found, _ = flow(flow.inverse(noise))
        for z, again in zip(noise, found, strict=True):
            torch.testing.assert_close(again, z, rtol=0, atol=20 * tolerance)


@torch.no_grad()
def test_scales_with_a_lower_bound_do_not_feed_on_unlikely_latents() -> None:
    """Where h is far below zero a coupling divides by almost nothing, and the next one sees the result."""
    images = {}
    for least in (0.0, 0.5):
        system = rough(steps=4, least_scale=least)
        for coupling in [m for m in system.flow.modules() if isinstance(m, Coupling)]:
            far = 1e3 * torch.randn(64, coupling.conv1.in_channels, 2, 2, generator=g(), dtype=torch.float64)
            scale = coupling._shift_and_log_scale(far)[1].exp()
            assert least <= scale.min() < least + 1e-9
            assert scale.max() == pytest.approx(1.0)
        system.flow.float()
        shapes = system.latent_shapes.values()
        images[least] = system.flow.inverse([4 * torch.randn(256, *shape, generator=g()) for shape in shapes])
    assert images[0.5].isfinite().all()
    assert not images[0.0].isfinite().all(), "without it this test shows nothing"


def test_factors_make_a_rotation_with_its_determinant() -> None:
    layer = InvertibleConv(7)
    layer.init_weights(g(3))
    W = layer.weight().detach()
    torch.testing.assert_close(W @ W.T, torch.eye(7), rtol=0, atol=1e-5)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g(1))
    x = torch.randn(2, 7, 3, 5, generator=g())
    y, log_det = layer(x)
    torch.testing.assert_close(y, torch.einsum("oi,nihw->nohw", layer.weight(), x))
    torch.testing.assert_close(log_det, 15 * torch.linalg.slogdet(layer.weight()).logabsdet)


def test_the_first_images_leave_every_actnorm_normalised() -> None:
    system = build("glow", "tiny8", {"steps": 2})
    assert isinstance(system, Glow)
    system.init_weights(g())
    batch = random_batch(system, 64)
    system.init_from_data(batch, g(1))
    seen: list[torch.Tensor] = []
    for layer in system.flow.modules():
        if isinstance(layer, ActNorm):
            layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    system.flow(system._seen(batch.images, g(1)))
    assert len(seen) == 4
    for y in seen:
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1]), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(y.shape[1]), rtol=0, atol=1e-3)
    assert not any(layer.initialises for layer in system.flow.modules() if isinstance(layer, ActNorm))


@pytest.mark.parametrize("slice_size", [8, 32])
def test_the_first_images_do_not_depend_on_workers_or_slices(tmp_path: Path, slice_size: int) -> None:
    """Each worker reads them for itself; what it reads is the beginning of the run's first batch."""
    pack("digits", tmp_path / "digits", size=8, limit=64)
    job = JobSpec.model_validate(
        {
            "name": "glow", "system": {"name": "glow", "preset": "tiny8"}, "data": {"path": str(tmp_path / "digits")},
            "training": {"total_kimg": 1, "batch_size": 32, "slice_size": slice_size},
            "resources": {"workers": 1},
        }
    )  # fmt: skip
    states = []
    with ShardedDataset.open(tmp_path / "digits") as dataset:
        for _ in range(2):
            system = build("glow", "tiny8")
            system.init_weights(g())
            _init_from_data(system, job, dataset, torch.device("cpu"))
            states.append(system.networks()["flow"].state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(k.endswith("log_scale") and v.abs().max() > 0.01 for k, v in states[0].items())


@pytest.mark.parametrize(
    ("preset", "fields", "count"),
    [
        ("cifar10", {}, 44_095_536),
        ("imagenet32", {}, 66_120_816),
        ("imagenet64", {}, 111_646_224),
        ("cifar10", {"resolution": 64, "levels": 6, "affine": False}, 177_559_056),
    ],
)
def test_sizes_of_the_papers_models(preset: str, fields: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        flow = build("glow", preset, fields).networks()["flow"]
    assert sum(p.numel() for p in flow.parameters()) == count


@torch.no_grad()
def test_probabilities_of_all_images_sum_to_the_share_of_samples_that_are_images() -> None:
    """Four pixels of one bit; the rest of the flow's density lies outside the cube of dequantised images."""
    system = build("glow", "tiny8", {"resolution": 2, "levels": 1, "steps": 2, "width": 8, "bits": 1})
    assert isinstance(system, Glow)
    system.init_weights(g())
    for i, p in enumerate(system.flow.parameters()):
        p += 0.1 * torch.randn(p.shape, generator=g(i))
    with initialising(system.flow):
        system.flow(torch.rand(64, 1, 2, 2, generator=g(1)) - 0.5)
    bits = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
    images = (2 * bits.float() - 1).view(16, 1, 2, 2).repeat(4000, 1, 1, 1)
    found = system.log_likelihood(Batch(images, torch.zeros(len(images), dtype=torch.int64)), g())
    drawn = system.flow.inverse([torch.randn(40_000, *s, generator=g(2)) for s in system.latent_shapes.values()])
    share = (drawn.abs() < 0.5).flatten(1).all(1).double().mean().item()
    assert 0.05 < share < 0.95
    assert found.exp().sum().item() / 4000 == pytest.approx(share, abs=0.015)


def test_the_loss_is_bits_per_dimension_and_latents_of_images_give_them_back() -> None:
    system = tiny_system("glow", bits=5)
    assert isinstance(system, Glow)
    batch = random_batch(system)
    nats = system.log_likelihood(batch, g(7))
    assert system.loss(batch, g(7)).value.item() == pytest.approx(-nats.mean().item() / 64 / math.log(2), rel=1e-5)
    noise, log_p = system.flow(system._seen(batch.images, g(7)))
    torch.testing.assert_close(nats, log_p.double() - 64 * 5 * math.log(2))
    with torch.no_grad():
        again = system.generate(dict(zip(system.latent_shapes, noise, strict=True)), batch.labels)
    torch.testing.assert_close(again, quantise(batch.images, 5))


def test_temperature_scales_the_noise() -> None:
    system, labels, draws = tiny_system("glow"), torch.zeros(4, dtype=torch.int64), g(2)
    noise = {k: 0.6 * torch.randn(4, *shape, generator=draws) for k, shape in system.latent_shapes.items()}
    with torch.no_grad():
        assert torch.equal(system.sample(labels, g(2), 0.6), system.generate(noise, labels))


def test_temperature_narrows_and_zero_is_one_image() -> None:
    system = tiny_system("glow")
    labels = torch.zeros(4, dtype=torch.int64)
    cold, warm = (system.sample(labels, g(), t) for t in (0.0, 1.0))
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(warm[0], warm[1])


def test_couplings_start_as_a_fixed_scaling() -> None:
    layer = Coupling(4, 8, affine=True)
    layer.init_weights(g())
    x = torch.randn(2, 4, 3, 3, generator=g())
    y, log_det = layer(x)
    s = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(y, torch.cat([x[:, :2], x[:, 2:] * s], 1))
    torch.testing.assert_close(log_det, torch.full((2,), 18 * math.log(s)))


def test_initialising_ends_even_after_an_error() -> None:
    layer = nn.Sequential(ActNorm(2))
    with pytest.raises(RuntimeError), initialising(layer):
        layer(torch.zeros(1, 3, 2, 2))
    assert not layer[0].initialises
