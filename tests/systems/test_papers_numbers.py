"""Optimisers, order and repeats of updates, and weights of losses of the smaller GANs, as their papers have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bessemer.systems.contract import Clock
from bessemer.systems.registry import build

SLOW, FAST = (0.0, 0.9), (0.5, 0.999)
"""Adam's decay rates in critics with a penalty or spectral normalisation, and in those after DCGAN."""

NUMBERS: dict[tuple[str, str], tuple[dict[str, float], tuple[float, float], list[tuple[str, int]], dict[str, Any]]] = {
    ("wgan-gp", "cifar10"): (
        {"generator": 2e-4, "critic": 2e-4}, SLOW, [("critic", 5), ("generator", 1)],
        {"penalty": 10.0, "latent_dim": 128, "generator_width": 128, "critic_width": 128},
    ),
    ("progan", "celebahq1024"): (
        {"generator": 1e-3, "discriminator": 1e-3}, (0.0, 0.99), [("discriminator", 1), ("generator", 1)],
        {"penalty": 10.0, "drift": 1e-3},
    ),
    ("sngan", "cifar10"): (
        {"generator": 2e-4, "discriminator": 2e-4}, SLOW, [("discriminator", 5), ("generator", 1)],
        {"latent_dim": 128, "generator_images": 2},
    ),
    ("sngan", "imagenet128"): (
        {"generator": 2e-4, "discriminator": 2e-4}, SLOW, [("discriminator", 5), ("generator", 1)],
        {"latent_dim": 128, "generator_images": 2},
    ),
    ("sagan", "imagenet128"): (
        {"generator": 1e-4, "discriminator": 4e-4}, SLOW, [("discriminator", 1), ("generator", 1)],
        {"generator_attention": (32,), "discriminator_attention": (32,)},
    ),
    ("infogan", "mnist"): (
        {"generator": 1e-3, "discriminator": 2e-4}, FAST, [("discriminator", 1), ("generator", 1)],
        {"noise_dim": 62, "categories": 10, "continuous": 2, "categorical_weight": 1.0, "continuous_weight": 0.1},
    ),
    ("bigan", "mnist"): (
        {"generator": 2e-4, "encoder": 2e-4, "discriminator": 2e-4}, FAST,
        [("discriminator", 1), ("generator", 1), ("encoder", 1)], {"latent_dim": 50, "hidden": 1024},
    ),
    ("cyclegan", "unpaired256"): (
        {"generator": 2e-4, "discriminator": 2e-4}, FAST, [("generator", 1), ("discriminator", 1)],
        {"cycle": 10.0, "identity": 0.0, "pool": 50, "blocks": 9, "jitter": 30},
    ),
    ("cyclegan", "paintings256"): (
        {"generator": 2e-4, "discriminator": 2e-4}, FAST, [("generator", 1), ("discriminator", 1)],
        {"cycle": 10.0, "identity": 5.0},
    ),
    ("pix2pix", "facades"): (
        {"generator": 2e-4, "discriminator": 2e-4}, FAST, [("discriminator", 1), ("generator", 1)],
        {"l1": 100.0, "patch_layers": 3, "jitter": 30},
    ),
    ("dvdgan", "kinetics600-64"): (
        {"generator": 1e-4, "discriminator": 5e-4}, (0.0, 0.999), [("discriminator", 2), ("generator", 1)],
        {"frames": 12, "spatial_frames": 8, "latent_dim": 120, "shared_dim": 120, "classes": 600},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "preset"), NUMBERS)
def test_numbers_of_the_paper(name: str, preset: str) -> None:
    rates, betas, updates, fields = NUMBERS[name, preset]
    with torch.device("meta"):
        system = build(name, preset)
    found = system.optimizers()
    assert {key: adam.lr for key, adam in found.items()} == rates
    assert {(adam.name, adam.betas, adam.eps) for adam in found.values()} == {("adam", betas, 1e-8)}
    assert {adam.weight_decay for adam in found.values()} == {2.5e-5 if name == "bigan" else 0.0}
    assert [(u.network, u.repeats) for u in system.updates(Clock(0, 0))] == updates
    assert {key: getattr(system.config, key) for key in fields} == fields
