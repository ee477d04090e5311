"""A small StyleGAN2 and batches for it."""

from __future__ import annotations

import torch

from bessemer.systems.adversarial.stylegan2 import StyleGAN2
from bessemer.systems.contract import Batch, Update
from bessemer.systems.registry import build

__all__ = ["batch_of", "double", "draws", "only", "small"]

SMALL = {
    "resolution": 16, "latent_dim": 6, "w_dim": 6, "channel_base": 64, "channel_max": 6, "minibatch_group": 2,
    "r1_gamma": 1.0, "augment_p": 0.7,
}  # fmt: skip


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: object) -> StyleGAN2:
    system = build("stylegan2", "tiny32", overrides={**SMALL, **fields})
    assert isinstance(system, StyleGAN2)
    system.init_weights(draws(9))
    with torch.no_grad():  # noise counts from the start
        for key, p in system.generator.named_parameters():
            if key.endswith("noise_strength"):
                p.fill_(0.3)
    return system


def double(**fields: object) -> StyleGAN2:
    system = small(**fields)
    for network in system.networks().values():
        network.double()
    return system


def batch_of(n: int = 4, seed: int = 5, channels: int = 3, dtype: torch.dtype = torch.float32) -> Batch:
    images = 2 * torch.rand(n, channels, 16, 16, generator=draws(seed), dtype=dtype) - 1
    return Batch(images, torch.randint(10, (n,), generator=draws(seed + 1)))


def only(system: StyleGAN2, update: Update) -> None:
    for name, network in system.networks().items():
        network.requires_grad_(name == update.network)
