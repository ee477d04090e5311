"""A small configuration of every system, and batches for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.nn.likelihoods import quantise
from bessemer.systems.contract import Batch, System
from bessemer.systems.registry import build, get
from bessemer.training.rng import generator

__all__ = ["SMALLER", "random_batch", "tiny_arguments", "tiny_system"]

SMALLER: Mapping[str, Mapping[str, Any]] = {
    "biggan": {
        "generator_width": 4, "discriminator_width": 4, "latent_dim": 20, "shared_dim": 8, "r1_gamma": 0.1,
        "r1_interval": 2, "standing_passes": 2, "standing_batch": 4,
    },
    "sngan": {"generator_width": 4, "discriminator_width": 4, "latent_dim": 8},
    "sagan": {"generator_width": 8, "discriminator_width": 8, "latent_dim": 8},
    "biggan-deep": {
        "generator_width": 8, "discriminator_width": 8, "latent_dim": 8, "shared_dim": 8, "standing_passes": 2,
        "standing_batch": 4,
    },
    "stylegan2": {
        "channel_base": 256, "channel_max": 8, "latent_dim": 8, "w_dim": 8, "minibatch_group": 4,
        "path_length_interval": 2, "r1_interval": 2, "augment_p": 0.3, "augment_interval": 2, "augment_kimg": 0.5,
    },
    "rbm": {
        "hidden": 16, "chains": 8, "gibbs_steps": 2, "sampling_steps": 20, "ais_temperatures": 20, "ais_chains": 10,
    },
    "vae": {"hidden": 16, "latent_dim": 4},
    "wgan-gp": {"generator_width": 4, "critic_width": 4, "latent_dim": 8, "critic_steps": 2},
    "glow": {"steps": 1, "width": 8},
    "pixelcnnpp": {"width": 4, "components": 2},
    "dbn": {
        "hidden": (16, 8), "layer_kimg": (0.016, 0.016), "gibbs_steps": 2, "sampling_steps": 20, "ais_temperatures": 20,
        "ais_chains": 10,
    },
    "dbm": {
        "hidden": (16, 8), "pretrain_kimg": (0.016, 0.016), "chains": 8, "sampling_steps": 20, "ais_temperatures": 20,
        "ais_chains": 10,
    },
    "vqvae": {
        "width": 8, "residual_width": 4, "codes": 16, "code_dim": 4, "prior_width": 4, "autoencoder_kimg": 0.016,
        "resolution": 16, "levels": 1, "classes": 3,
    },
    "progan": {
        "latent_dim": 8, "channel_base": 64, "channel_max": 8, "resolution": 8, "fade_kimg": 0.016,
        "stable_kimg": 0.016,
    },
    "dvdgan": {
        "frames": 4, "spatial_frames": 2, "generator_width": 2, "discriminator_width": 2, "latent_dim": 4,
        "shared_dim": 3, "classes": 3,
    },
    "wavenet": {
        "samples": 24, "rate": 100, "levels": 16, "blocks": 2, "layers": 3, "width": 4, "gate_width": 5,
        "skip_width": 6, "classes": 3,
    },
    "infogan": {"noise_dim": 4, "width": 4, "hidden": 16, "q_hidden": 8},
    "bigan": {"latent_dim": 4, "hidden": 16},
    "cyclegan": {"width": 2, "blocks": 1, "discriminator_width": 4, "identity": 5.0, "pool": 6},
    "pix2pix": {"width": 4, "discriminator_width": 4, "target_channels": 1},
    "nvae": {
        "width": 4, "groups": (2, 1), "latent_channels": 2, "components": 2, "flows": 1, "kl_warmup_kimg": 0.02,
        "standing_passes": 2, "standing_batch": 4, "resolution": 16,
    },
}  # fmt: skip
"""System -> fields on top of its first `tiny` preset (its first preset where there is none). A stage in them lasts 16
images, two iterations of the tests."""


OTHER_PRESETS = {"sagan": "cifar10"}
"""Systems whose small configuration is not made from their first `tiny` preset, or their first."""


def tiny_arguments(name: str) -> tuple[str, str, dict[str, Any]]:
    """System, preset and fields of its small configuration."""
    presets = list(get(name).presets)
    tiny = [preset for preset in presets if preset.startswith("tiny")]
    return name, OTHER_PRESETS.get(name, (tiny or presets)[0]), dict(SMALLER.get(name, {}))


def tiny_system(name: str, seed: int = 0, **more: Any) -> System:
    """A system with drawn weights, which has seen a first batch if it needs one."""
    system, preset, fields = tiny_arguments(name)
    built = build(system, preset, {**fields, **more})
    built.init_weights(generator("cpu", seed, "init"))
    if built.init_images:
        built.init_from_data(random_batch(built, 8), generator("cpu", seed, "init from data"))
    return built


def random_batch(system: System, n: int = 4, *purpose: int, slice: int = 0, slices: int = 1) -> Batch:  # noqa: A002
    """Smooth random pictures of 8 bits or sounds of 16 in each field that the system takes, and random labels."""
    g = generator("cpu", 0, "random batch", *purpose)
    fields = {name: _smooth((n, *shape), g) for name, shape in system.batch_shapes.items()}
    labels = torch.randint(system.config.classes, (n,), generator=g)
    return Batch(None, labels, slice, slices, **fields)


def _smooth(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    if len(shape) == 2:  # of sound or bits
        wave = torch.randn(shape, generator=g).cumsum(1) / 4
        return (torch.sin(wave) * 32767).round() / 32768
    *frames, channels, side, _ = shape
    coarse = torch.randn(math.prod(frames), channels, math.ceil(side / 4), math.ceil(side / 4), generator=g)
    fine = F.interpolate(coarse, side, mode="bilinear")
    return quantise((fine + 0.1 * torch.randn(fine.shape, generator=g)).clamp(-1, 1), 8).view(shape)
