"""SNGAN (Miyato et al. 2018, arXiv:1802.05957) and its projection discriminator (Miyato and Koyama, arXiv:1802.05637).

BigGAN's residual blocks come from here: its networks at resolution 32 are those of table 4 with other widths, those at
128 are the residual networks of appendix B. The generator is without spectral normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Generator

from bessemer.nn.init import init_weights, scale_branches
from bessemer.systems.adversarial.biggan import BigGAN

__all__ = ["SNGAN"]

# Adam's numbers and the steps of D are the paper's (appendix B.2), images per step of G those of the authors' code.
_SNGAN = {
    "generator_width": 64, "latent_dim": 128, "shared_dim": 0, "hierarchical": False, "generator_spectral": False,
    "generator_attention": (), "discriminator_attention": (), "init": "xavier", "sn_eps": 1e-8, "adam_eps": 1e-8,
    "generator_lr": 2e-4, "discriminator_lr": 2e-4, "betas": (0.0, 0.9), "d_steps": 5, "generator_images": 2,
    "standing_passes": 0,
}  # fmt: skip


class SNGAN(BigGAN):
    """GAN with hinge loss whose discriminator is spectrally normalised, with five steps to one of the generator."""

    name: ClassVar[str] = "sngan"
    paper: ClassVar[str] = (
        "T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida: Spectral Normalization for Generative Adversarial Networks, "
        "ICLR 2018, arXiv:1802.05957; with T. Miyato, M. Koyama: cGANs with Projection Discriminator, ICLR 2018, "
        "arXiv:1802.05637"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cifar10": {**_SNGAN, "resolution": 32, "classes": 10, "conditional": False, "discriminator_width": 32},
        "cifar10-projection": {**_SNGAN, "resolution": 32, "classes": 10, "discriminator_width": 32},
        "imagenet128": {
            **_SNGAN, "resolution": 128, "classes": 1000, "discriminator_width": 64, "thin_discriminator": True,
        },
    }  # fmt: skip

    def init_weights(self, generator: Generator) -> None:
        """Xavier, times He's √2 in the residual blocks' branches, and biases of 0, as in the authors' code."""
        for network in self.networks().values():
            init_weights(network, generator, self.config.init, biases="zeros")
            if self.config.init == "xavier":
                scale_branches(network.get_submodule("blocks").children())
