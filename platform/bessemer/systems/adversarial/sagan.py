"""SAGAN (Zhang, Goodfellow, Metaxas and Odena 2019, arXiv:1805.08318): SNGAN's networks with self-attention.

Spectral normalisation is in both networks, and the discriminator learns four times as fast as the generator, with one
step to one (TTUR, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bessemer.systems.adversarial.biggan import BigGAN

__all__ = ["SAGAN"]

_SAGAN = {
    "generator_width": 64, "discriminator_width": 64, "latent_dim": 128, "shared_dim": 0, "hierarchical": False,
    "init": "xavier", "sn_eps": 1e-8, "adam_eps": 1e-8, "generator_lr": 1e-4, "discriminator_lr": 4e-4,
    "betas": (0.0, 0.9), "standing_passes": 0,
}  # fmt: skip


class SAGAN(BigGAN):
    """Class-conditional GAN with hinge loss and one layer of self-attention in each network."""

    name: ClassVar[str] = "sagan"
    paper: ClassVar[str] = (
        "H. Zhang, I. Goodfellow, D. Metaxas, A. Odena: Self-Attention Generative Adversarial Networks, ICML 2019, "
        "arXiv:1805.08318"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet128": {
            **_SAGAN, "resolution": 128, "classes": 1000,
            "generator_attention": (32,), "discriminator_attention": (32,),
        },
        # BigGAN-PyTorch's launch script: attention at 64, and another decay rate.
        "imagenet128-attn64": {**_SAGAN, "resolution": 128, "classes": 1000, "betas": (0.0, 0.999)},
        "cifar10": {
            **_SAGAN, "resolution": 32, "classes": 10, "discriminator_width": 32, "generator_attention": (16,),
            "discriminator_attention": (16,), "attention_once": True,
        },
    }  # fmt: skip
