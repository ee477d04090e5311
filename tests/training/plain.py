"""Training loops that know nothing but torch, to hold our runs against.

One process, the whole batch at once, torch's optimizers and textbook losses: no slices, no engine, no System. Their
only link to the runs under test is the draw of data and latents, which is part of the contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.training.rng import generator

LATENT, STYLE, SLICE, SEED, ITERATIONS = 5, 7, 4, 11, 4
METHODS = ("hinge", "r1", "wgan_gp", "path_length", "vae")

SHAPES = {
    "generator": {
        "mapping.0.weight": (STYLE, LATENT), "mapping.0.bias": (STYLE,),
        "synthesis.0.weight": (16, STYLE), "synthesis.0.bias": (16,),
        "synthesis.2.weight": (12, 16), "synthesis.2.bias": (12,),
    },
    "discriminator": {"0.weight": (17, 12), "0.bias": (17,), "2.weight": (1, 17), "2.bias": (1,)},
    "vae": {
        "encoder.0.weight": (16, 12), "encoder.0.bias": (16,),
        "encoder.2.weight": (2 * LATENT, 16), "encoder.2.bias": (2 * LATENT,),
        "decoder.0.weight": (16, LATENT), "decoder.0.bias": (16,),
        "decoder.2.weight": (12, 16), "decoder.2.bias": (12,),
    },
}  # fmt: skip


def layer(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def perceptron(x: Tensor, p: dict[str, Tensor], first: str, second: str) -> Tensor:
    return layer(torch.tanh(layer(x, p, first)), p, second)


class PlainLoop:
    """Trains one method with nothing but torch."""

    def __init__(self, method: str, slices: int, optimizer: str) -> None:
        self.method, self.slices = method, slices
        names = ("vae",) if method == "vae" else ("generator", "discriminator")
        draws = generator("cpu", SEED, "init")
        self.p: dict[str, dict[str, Tensor]] = {}
        for name in names:
            self.p[name] = {k: torch.randn(s, generator=draws).mul(0.3) for k, s in SHAPES[name].items()}
        self.optimizers = {}
        for name, parameters in self.p.items():
            lazy = {"r1": "discriminator", "path_length": "generator"}.get(method) == name
            c = 2 / 3 if lazy else 1.0  # one more step every two iterations
            tensors = [t.requires_grad_() for t in parameters.values()]
            self.optimizers[name] = {
                "adam": lambda t, c: torch.optim.Adam(t, 2e-3 * c, (0.5**c, 0.9**c), 1e-4),
                "adamax": lambda t, c: torch.optim.Adamax(t, 2e-3 * c, (0.5**c, 0.9**c), 1e-4),
                "rmsprop": lambda t, c: torch.optim.RMSprop(t, 2e-4 * c, 0.99**c, 1e-4),
            }[optimizer](tensors, c)
        self.path_mean = torch.zeros(1)
        self.norms: dict[str, list[float]] = {name: [] for name in names}

    def step(self, name: str, loss: Tensor) -> None:
        parameters = list(self.p[name].values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        self.norms[name].append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        self.optimizers[name].step()

    def draws(self, purpose: str, nimg: int) -> list[torch.Generator]:
        return [generator("cpu", SEED, purpose, nimg, i) for i in range(self.slices)]

    def images(self, nimg: int) -> Tensor:
        return torch.cat([torch.randn(SLICE, 12, generator=g) for g in self.draws("data", nimg)])

    def latents(self, draws: list[torch.Generator]) -> Tensor:
        return torch.cat([torch.randn(SLICE, LATENT, generator=g) for g in draws])

    def d(self, x: Tensor) -> Tensor:
        return perceptron(x, self.p["discriminator"], "0", "2")

    def style(self, z: Tensor) -> Tensor:
        return torch.tanh(layer(z, self.p["generator"], "mapping.0"))

    def g(self, style: Tensor) -> Tensor:
        return perceptron(style, self.p["generator"], "synthesis.0", "synthesis.2")

    def run(self) -> dict[str, Tensor]:
        n = self.slices * SLICE
        for iteration in range(ITERATIONS):
            nimg = iteration * n
            x = self.images(nimg)
            if self.method == "vae":
                self.vae(x, nimg)
                continue
            draws = self.draws("d", nimg)
            fake = self.g(self.style(self.latents(draws))).detach()
            if self.method == "wgan_gp":
                mix = torch.cat([torch.rand(SLICE, 1, generator=g) for g in draws])
                between = (fake + mix * (x - fake)).requires_grad_()
                (slope,) = torch.autograd.grad(self.d(between).sum(), between, create_graph=True)
                penalty = 10 * (slope.square().sum(1).sqrt() - 1).square().mean()
                self.step("discriminator", self.d(fake).mean() - self.d(x).mean() + penalty)
            else:
                margins = (1 - self.d(x)).clamp(min=0).mean() + (1 + self.d(fake)).clamp(min=0).mean()
                self.step("discriminator", margins)
            if self.method == "r1" and iteration % 2 == 0:
                x.requires_grad_()
                (slope,) = torch.autograd.grad(self.d(x).sum(), x, create_graph=True)
                self.step("discriminator", slope.square().sum() / n)
            if self.method == "path_length" and iteration % 2 == 0:
                draws = self.draws("path", nimg)
                style = self.style(self.latents(draws))
                noise = torch.cat([torch.randn(SLICE, 12, generator=g) for g in draws])
                (slope,) = torch.autograd.grad((self.g(style) * noise).sum(), style, create_graph=True)
                lengths = slope.square().sum(1).sqrt()
                self.step("generator", 2 * (lengths - self.path_mean).square().mean())
                self.path_mean = 0.9 * self.path_mean + 0.1 * lengths.detach().mean()
            z = self.latents(self.draws("g", nimg))
            self.step("generator", -self.d(self.g(self.style(z))).mean())
        out = {f"{name}.{k}": t.detach() for name, p in self.p.items() for k, t in p.items()}
        if self.method != "vae":
            out["generator.path.mean"] = self.path_mean
        return out | {f"grad_norm/{name}": torch.tensor(v).mean() for name, v in self.norms.items()}

    def vae(self, x: Tensor, nimg: int) -> None:
        p = self.p["vae"]
        code = perceptron(x, p, "encoder.0", "encoder.2")
        mean, log_var = code[:, :LATENT], code[:, LATENT:]
        noise = torch.cat([torch.randn(SLICE, LATENT, generator=g) for g in self.draws("vae", nimg)])
        y = perceptron(mean + torch.exp(0.5 * log_var) * noise, p, "decoder.0", "decoder.2")
        kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        self.step("vae", (((y - x) ** 2).sum() + kl) / len(x))
