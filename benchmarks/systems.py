"""A training step of each flagship beside the same network in plain PyTorch, written from the paper.

One thread, small presets, the same weights on both sides; that outputs agree is checked first. The plain sides are in
`_plain_*.py`. Both run PyTorch's own optimizers, and neither DeepSpeed nor the data stream takes part. A profile then
says how much of our step is not spent in convolutions and matrix products, of which a limit would be made.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import _plain_biggan
import _plain_nvae
import _plain_stylegan2
import torch
from _common import Ratio, alternate, finish, parse_options, ratio, spread
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bessemer.nn.likelihoods import quantise
from bessemer.nn.update_state import UpdateState
from bessemer.systems.adversarial.biggan import BigGAN, BigGANConfig
from bessemer.systems.adversarial.biggan_networks import D_WIDTHS, G_WIDTHS
from bessemer.systems.adversarial.stylegan2 import StyleGAN2
from bessemer.systems.autoencoding.nvae import NVAE, balance
from bessemer.systems.contract import Batch, Clock, System
from bessemer.systems.registry import build

GOAL = 1.0  # of a plain step's time
TOLERANCE = 1e-4
PRODUCTS = ("convolution", "conv2d", "mkldnn", "addmm", "bmm", "::mm", "conv_transpose", "linear", "matmul")

Sides = dict[str, Callable[[], object]]


def generator(seed: int = 0) -> torch.Generator:
    """A stream of random numbers."""
    return torch.Generator().manual_seed(seed)


def ready(name: str, preset: str, **fields: object) -> System:
    """A system with its first weights; attention takes part."""
    system = build(name, preset, fields)
    system.init_weights(generator(1))
    for network in system.networks().values():
        network.train()
        for key, parameter in network.named_parameters():
            if key.endswith("gamma"):
                parameter.data.fill_(0.5)
    return system


def take_over(plain: nn.Module, ours: nn.Module) -> None:
    """Give a plain network our weights; what belongs to batch normalisation has other names there."""
    state = {
        key.removesuffix("gain") + "weight" if key.endswith(".gain") else key: v for key, v in ours.state_dict().items()
    }
    wanted = {}
    for key in plain.state_dict():
        if not key.endswith("num_batches_tracked"):
            wanted[key] = state[key if key in state else key.replace(".norm.running", ".running")].clone()
    plain.load_state_dict(wanted, strict=False)


def require_equal(what: str, ours: Tensor, plain: Tensor) -> float:
    """Largest difference of two outputs, relative to the largest value; a comparison of unequal networks is none."""
    differ = float((ours - plain).abs().max() / plain.abs().max())
    if not differ < TOLERANCE:
        raise SystemExit(f"{what}: the two sides compute different functions; they differ by {differ:.2g}")
    return differ


class OurLoop:
    """Updates of a system with torch's optimizers."""

    def __init__(self, system: System, batch: Batch) -> None:
        self.system, self.batch, self.draws = system, batch, generator(2)
        kinds = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}
        self.optimizers = {
            name: kinds[o.name](
                system.networks()[name].parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
            )
            for name, o in system.optimizers().items()
        }
        self.updates = {u.name: u for u in system.updates(Clock(0, 0))}

    def update(self, name: str) -> None:
        """One optimizer step."""
        update, networks = self.updates[name], self.system.networks()
        state = UpdateState(networks.values())
        state.begin()
        for key, network in networks.items():
            network.requires_grad_(key == update.network)
        self.optimizers[update.network].zero_grad()
        update.loss(self.batch, self.draws).value.backward()
        state.commit()
        self.optimizers[update.network].step()


def images(n: int, size: int) -> Batch:
    """Noise in place of images: what a step costs does not depend on them."""
    return Batch(quantise(2 * torch.rand(n, 3, size, size, generator=generator(3)) - 1, 8), torch.arange(n) % 10)


def biggan(preset: str, n: int) -> tuple[dict[str, Sides], dict[str, float], System]:
    """One step of D and one of G."""
    fields: dict[str, Any] = {} if preset == "tiny32" else {"orthogonal": 0.0, "d_steps": 1}
    system = ready("biggan", preset, **fields)
    assert isinstance(system, BigGAN)
    c = system.config
    assert isinstance(c, BigGANConfig)
    G = _plain_biggan.Generator(
        [c.generator_width * w for w in G_WIDTHS[32]], c.latent_dim, c.shared_dim, c.classes, set(c.generator_attention)
    )
    D = _plain_biggan.Discriminator(
        [c.discriminator_width * w for w in D_WIDTHS[32]], c.classes, 16 in c.discriminator_attention
    )
    take_over(G, system.generator)
    take_over(D, system.discriminator)
    batch = images(n, 32)
    networks = (system.generator, system.discriminator, G, D)
    for network in networks:
        network.eval()
    with torch.no_grad():
        z = torch.randn(n, c.latent_dim, generator=generator(4))
        differ = {
            "generator": require_equal("generator", system.generator(z, batch.labels), G(z, batch.labels)),
            "discriminator": require_equal(
                "discriminator", system.discriminator(batch.images, batch.labels), D(batch.images, batch.labels)
            ),
        }
    for network in networks:
        network.train()
    loop = OurLoop(system, batch)
    optimizers = tuple(
        torch.optim.Adam(m.parameters(), lr=o.lr, betas=o.betas, eps=o.eps)
        for m, o in zip((G, D), system.optimizers().values(), strict=True)
    )

    def ours() -> None:
        loop.update("discriminator")
        loop.update("generator")

    def plain() -> None:
        _plain_biggan.step(G, D, optimizers, batch.images, batch.labels, c.orthogonal, c.latent_dim, c.classes)

    return {"step": {"ours": ours, "plain": plain}}, differ, system


def stylegan2(n: int) -> tuple[dict[str, Sides], dict[str, float], System]:
    """Each of the four updates by itself, without augmentation."""
    system = ready("stylegan2", "tiny32", augment="none", channel_base=2048, channel_max=128)
    assert isinstance(system, StyleGAN2)
    c = system.config
    widths = [c.width(r) for r in (4, 8, 16, 32)]
    G = _plain_stylegan2.Generator(widths, c.latent_dim, c.w_dim, c.mapping_layers)
    D = _plain_stylegan2.Discriminator(widths, c.minibatch_group)
    take_over(G, system.generator)
    take_over(D, system.discriminator)
    batch = images(n, 32)
    with torch.no_grad():
        z = torch.randn(n, c.latent_dim, generator=generator(4))
        noise = system.generator.synthesis.draw_noise(n, generator(5))
        w = G.mapping(z)
        mine = system.generator.synthesis(system.generator.broadcast(system.generator.mapping(z, batch.labels)), noise)
        theirs = G.synthesis(w[:, None].expand(-1, len(noise) + 1, -1), noise)
        differ = {
            "generator": require_equal("generator", mine, theirs),
            "discriminator": require_equal(
                "discriminator", system.discriminator(batch.images, batch.labels), D(batch.images)
            ),
        }
    loop = OurLoop(system, batch)
    training = _plain_stylegan2.Training(G, D, c.latent_dim, c.style_mixing, c.r1_gamma)
    names = ("generator", "path_length", "discriminator", "r1")
    sides: dict[str, Sides] = {
        name: {
            "ours": lambda name=name: loop.update(name),  # type: ignore[misc]
            "plain": lambda name=name: getattr(training, name)(batch.images),  # type: ignore[misc]
        }
        for name in names
    }
    return sides, differ, system


def nvae(n: int) -> tuple[dict[str, Sides], dict[str, float], System]:
    """One step."""
    system = ready("nvae", "tiny32", width=32, encoder_cells=2, decoder_cells=2)
    assert isinstance(system, NVAE)
    c = system.config
    plain_vae = _plain_nvae.NVAE(
        32, c.width, c.groups, c.latent_channels, c.encoder_cells, c.process_cells, 10 * c.components
    )
    take_over(plain_vae, system.vae)
    batch = images(n, 32)
    for network in (system.vae, plain_vae):
        network.eval()
    with torch.no_grad():
        parameters, draws = system.vae(batch.images, system.vae.draw_noise(n, generator(4)))
        theirs, kls = plain_vae(batch.images, generator(4))
        differ = {
            "parameters": require_equal("parameters", parameters, theirs),
            "kl": require_equal("kl", torch.stack([draw.kl for draw in draws]), torch.stack(kls)),
            "log likelihood": require_equal(
                "log likelihood",
                system._output(parameters).log_prob(batch.images),
                _plain_nvae.log_likelihood(theirs, batch.images),
            ),
        }
    for network in (system.vae, plain_vae):
        network.train()
    loop, vectors, draws_of_plain = OurLoop(system, batch), dict[str, Tensor](), generator(2)
    optimizer = torch.optim.Adamax(plain_vae.parameters(), lr=c.lr, eps=1e-3, weight_decay=c.weight_decay)
    sizes = torch.tensor(system._sizes)

    def plain() -> None:
        optimizer.zero_grad()
        parameters, kls = plain_vae(batch.images, draws_of_plain)
        kl = torch.stack(kls)
        loss = 1e-4 * (kl * balance(kl, sizes)[:, None]).sum(0) - _plain_nvae.log_likelihood(parameters, batch.images)
        (loss.mean() + c.spectral * _plain_nvae.penalty(plain_vae, vectors, c.power_iterations)).backward()
        optimizer.step()

    return {"step": {"ours": lambda: loop.update("elbo"), "plain": plain}}, differ, system


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The call, as seconds of CPU: other programs on the machine change them little."""

    def side() -> float:
        begun = time.process_time()
        call()
        return time.process_time() - begun

    return side


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """Shares of the CPU's time by operation, of one call: products, and the ten largest of the others."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    times = {event.key: float(event.self_cpu_time_total) for event in found.key_averages()}
    whole = math.fsum(times.values())
    products = math.fsum(t for key, t in times.items() if any(word in key for word in PRODUCTS))
    others = sorted(((k, t) for k, t in times.items() if not any(w in k for w in PRODUCTS)), key=lambda kt: -kt[1])
    return {"products": products / whole, **{key: t / whole for key, t in others[:10]}}


def main() -> int:
    """Measure every flagship."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    rounds, n = (2, 4) if options.quick else (5, 16)
    flagships: Mapping[str, Callable[[], tuple[dict[str, Sides], dict[str, float], System]]] = {
        "biggan": lambda: biggan("tiny32", 2 * n),
        "stylegan2": lambda: stylegan2(n),
        "nvae": lambda: nvae(n),
    }
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {"images": {"biggan": 2 * n, "stylegan2": n, "nvae": n}, "threads": 1}
    for name, make in flagships.items():
        torch.manual_seed(0)
        parts, differ, system = make()
        raw[name] = {"config": system.config.model_dump(mode="json"), "largest difference": differ}
        for part, sides in parts.items():
            seconds = alternate({side: timed(call) for side, call in sides.items()}, rounds)
            ratios.append(ratio(f"{name}_{part}", seconds["ours"], seconds["plain"], GOAL))
            shares = profiled(sides["ours"])
            ratios.append(Ratio(f"{name}_{part}_not_in_products", 1 - shares["products"]))
            raw[name][part] = {
                "cpu_seconds": seconds,
                "spread": {side: spread(values) for side, values in seconds.items()},
                "profile of ours": shares,
                "profile of plain": profiled(sides["plain"]),
            }
    return finish(ratios, raw, options)


if __name__ == "__main__":
    sys.exit(main())
