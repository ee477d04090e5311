"""Restricted Boltzmann machine (Smolensky 1986), trained by contrastive divergence (Hinton 2002) or persistent chains.

The order is that of Hinton's practical guide (2010, UTML TR 2010-003), of whose ranges momentum and weight decay are;
the learning rate is ours. Log Z is estimated as by Salakhutdinov and Murray (2008), whose 500 hidden units, CD-1, CD-25
and 100 chains the presets have. Theirs go through 14,500 temperatures, two thirds of them above 0.9; ours through
fewer, at equal distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from bessemer.nn.binary import Binarisation, binarise, draw_bits
from bessemer.nn.precision import full_precision
from bessemer.nn.slice_memory import SliceMemory
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, SystemConfig, Update
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = [
    "RBM",
    "BinaryConfig",
    "LogZ",
    "Machine",
    "RBMConfig",
    "RBMNetwork",
    "as_bits",
    "as_images",
    "log_partition",
    "penalty",
    "protocol",
]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_ENUMERABLE = 12
"""Hidden units up to which log Z is summed exactly."""


class BinaryConfig(SystemConfig):
    """What machines of binary units share."""

    resolution: Count
    """Height and width of the images in pixels."""
    channels: Literal[1] = 1
    """Grey images."""
    binarise: Binarisation = "random"
    """How grey pixels become bits: `random` draws them anew each time, `threshold` cuts at the middle."""
    lr: Positive = 0.05
    """Learning rate of gradient descent."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""
    weight_decay: Weight = 2e-4
    """λ of the penalty λ/2·‖W‖²; biases have none (practical guide, section 10)."""
    sampling_steps: Count = 1000
    """Gibbs steps to a sample, from pixels drawn independently."""
    ais_temperatures: Count = 1000
    """Inverse temperatures of annealed importance sampling, at equal distances."""
    ais_chains: Count = 100
    """Chains of annealed importance sampling."""

    @property
    def pixels(self) -> int:
        """Visible units."""
        return self.channels * self.resolution**2


class RBMConfig(BinaryConfig):
    """Configuration of the RBM."""

    hidden: Count = 500
    """Hidden units."""
    gibbs_steps: Count = 1
    """k, Gibbs steps per update."""
    chains: Annotated[int, Field(ge=0)] = 0
    """Persistent chains, shared out over the slices; 0 begins each update's chains at the data (CD-k)."""


def as_bits(images: Tensor, rule: Binarisation, generator: Generator) -> Tensor:
    """V in {0, 1}: [N, C, H, W] in [-1, 1] -> [N, pixels]."""
    return binarise(images, rule, generator).flatten(1).add(1).div(2)


def penalty(c: BinaryConfig, *weights: Tensor) -> Tensor:
    """λ/2·Σ‖W‖², a scalar. A part of the loss, as the optimizer's own would pull at biases and at layers that rest."""
    return 0.5 * c.weight_decay * torch.stack([W.square().sum() for W in weights]).sum()


def as_images(probabilities: Tensor, c: SystemConfig) -> Tensor:
    """[N, pixels] in [0, 1] -> [N, C, H, W] in [-1, 1]."""
    return probabilities.view(-1, c.channels, c.resolution, c.resolution).float().mul(2).sub(1)


class Machine:
    """p(v, h) ∝ exp(aᵀv + bᵀh + vᵀWh) over bits, whatever holds W [visible, hidden], a and b."""

    W: Tensor
    a: Tensor
    b: Tensor

    def free_energy(self, v: Tensor, beta: float = 1.0) -> Tensor:
        """F(v) = -aᵀv - Σ_j softplus(β(b_j + vᵀW_j)), [N]; p(v) = exp(-F(v))/Z. β < 1 weakens the hidden units."""
        return -v @ self.a - F.softplus(beta * (v @ self.W + self.b)).sum(1)

    def hidden_given(self, v: Tensor, beta: float = 1.0) -> Tensor:
        """P(h_j = 1 | v), [N, hidden]."""
        return torch.sigmoid(beta * (v @ self.W + self.b))

    def visible_given(self, h: Tensor, beta: float = 1.0) -> Tensor:
        """P(v_i = 1 | h), [N, visible]."""
        return torch.sigmoid(self.a + beta * (h @ self.W.T))

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int, generator: Generator, beta: float = 1.0) -> Tensor:
        """So many steps v -> h -> v of block Gibbs sampling: bits."""
        for _ in range(steps):
            h = draw_bits(self.hidden_given(v, beta), generator)
            v = draw_bits(self.visible_given(h, beta), generator)
        return v


class RBMNetwork(nn.Module, Machine):
    """A machine whose W, a and b are learned, with the persistent chains that it is trained by, if any."""

    def __init__(self, visible: int, hidden: int, chains: int = 0) -> None:
        super().__init__()
        self.chains = SliceMemory(chains, (visible,)) if chains else None
        """Persistent chains; visible units."""
        self.W = nn.Parameter(torch.zeros(visible, hidden))
        self.a = nn.Parameter(torch.zeros(visible))
        self.b = nn.Parameter(torch.zeros(hidden))

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        """W ~ N(0, 0.01²), biases 0 (practical guide, section 8); chains begin anywhere."""
        self.W.normal_(0, 0.01, generator=generator)
        self.a.zero_()
        self.b.zero_()
        if self.chains is not None:
            self.chains.values.copy_(draw_bits(torch.full_like(self.chains.values, 0.5), generator))

    @torch.no_grad()
    def start_at(self, v: Tensor) -> None:
        """Visible biases are the log odds of each bit of v [N, visible], with one bit of each kind (section 8.1)."""
        self.a.copy_(torch.logit((v.sum(0) + 1) / (len(v) + 2)))


def enumerate_states(units: int, like: Tensor) -> Tensor:
    """All states of so many bits, [2^units, units]."""
    return (torch.arange(2**units, device=like.device)[:, None] >> torch.arange(units, device=like.device)) & 1


@torch.no_grad()
def log_partition(rbm: Machine, temperatures: int, chains: int, generator: Generator) -> Tensor:
    """Log Z: a sum over the states of the hidden units where they are few, else annealed importance sampling.

    The chains go from the machine without hidden units, whose Z is known, to the machine itself, through
    p_β(v) ∝ exp(-F(v; β)) with β from 0 to 1 (Salakhutdinov and Murray 2008, section 4.1). The estimate of Z is without
    bias, so that of log Z is too low, if anything.

    Returns:
        A scalar, float64.
    """
    hidden, dtype = len(rbm.b), torch.float64
    if hidden <= _ENUMERABLE:
        h = enumerate_states(hidden, rbm.b).to(dtype)
        return torch.logsumexp(h @ rbm.b.to(dtype) + F.softplus(rbm.a + h @ rbm.W.T.to(dtype)).sum(1), 0)
    v = draw_bits(torch.sigmoid(rbm.a).expand(chains, -1), generator)
    log_w = torch.zeros(chains, dtype=dtype, device=v.device)
    for step in range(temperatures):
        before, beta = step / temperatures, (step + 1) / temperatures
        log_w += (rbm.free_energy(v, before) - rbm.free_energy(v, beta)).to(dtype)
        v = rbm.gibbs(v, 1, generator, beta)
    log_z0 = hidden * math.log(2) + F.softplus(rbm.a.to(dtype)).sum()
    return log_z0 + torch.logsumexp(log_w, 0) - math.log(chains)


class LogZ:
    """Log Z of a machine, estimated once for its present weights, from its own seed: the same for all images."""

    def __init__(self) -> None:
        self._known: tuple[object, Tensor] | None = None

    def of(self, machine: Machine, c: BinaryConfig, parameters: Iterable[Tensor] = ()) -> Tensor:
        """A scalar, float64; `parameters` are those that a machine is computed from, if W, a and b are none."""
        weights = [(id(p), p._version) for p in (*parameters,) or (machine.W, machine.a, machine.b)]
        if self._known is None or self._known[0] != weights:
            draws = Generator(machine.W.device).manual_seed(0)
            self._known = (weights, log_partition(machine, c.ais_temperatures, c.ais_chains, draws))
        return self._known[1]


def protocol(c: BinaryConfig, hidden: int, about: str = "") -> str:
    """What a likelihood of this machine means."""
    rule = "binarised by drawing" if c.binarise == "random" else "binarised at the middle"
    exact = "exact log Z" if hidden <= _ENUMERABLE else f"AIS {c.ais_temperatures} x {c.ais_chains}"
    return f"{rule}, {about}{exact}"


class RBM(LikelihoodSystem):
    """Restricted Boltzmann machine of binary units: CD-k, PCD, and log-likelihoods by annealed importance sampling."""

    name: ClassVar[str] = "rbm"
    family: ClassVar[str] = "energy"
    paper: ClassVar[str] = (
        "G. E. Hinton: Training Products of Experts by Minimizing Contrastive Divergence, Neural Computation 14, 2002, "
        "doi:10.1162/089976602760128018; with T. Tieleman: Training Restricted Boltzmann Machines using Approximations "
        "to the Likelihood Gradient, ICML 2008, doi:10.1145/1390156.1390290; and R. Salakhutdinov, I. Murray: On the "
        "Quantitative Analysis of Deep Belief Networks, ICML 2008, doi:10.1145/1390156.1390266"
    )
    modality: ClassVar[str] = "binary images"
    Config: ClassVar[type[SystemConfig]] = RBMConfig
    init_images: ClassVar[int] = 1000
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {"resolution": 8, "hidden": 64, "chains": 64, "gibbs_steps": 5},
        "mnist-cd1": {"resolution": 28},
        "mnist-cd25": {"resolution": 28, "gibbs_steps": 25},
        "mnist-pcd": {"resolution": 28, "chains": 100},
    }

    config: RBMConfig

    def __init__(self, config: RBMConfig) -> None:
        self.config = config
        self.rbm = RBMNetwork(config.pixels, config.hidden, config.chains)
        self._log_z = LogZ()

    def networks(self) -> dict[str, nn.Module]:
        return {"rbm": self.rbm}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        return {"rbm": OptimizerDefaults("sgd", lr=c.lr, momentum=c.momentum)}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [Update("contrast", "rbm", self.loss, whole_weights=True)]

    def refusal(self, slices: int) -> str | None:
        chains = self.config.chains
        return f"{chains} chains (system.config.chains) are no multiple of {slices}" if chains % slices else None

    def init_weights(self, generator: Generator) -> None:
        self.rbm.init_weights(generator)

    def init_from_data(self, batch: Batch, generator: Generator) -> None:
        """Begin with the mean image."""
        self.rbm.start_at(as_bits(batch.images, self.config.binarise, generator))

    def loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[F(v⁰)] - E[F(vᵏ)] + λ/2·‖W‖², vᵏ constant: the gradient of CD-k, ⟨vhᵀ⟩ᵏ - ⟨vhᵀ⟩⁰ with h summed out.

        vᵏ comes after k Gibbs steps from the data, or from where the persistent chains stood (PCD).
        """
        c, rbm = self.config, self.rbm
        with full_precision(rbm.W):
            v0 = as_bits(batch.images, c.binarise, generator)
            start = v0 if rbm.chains is None else rbm.chains.read(batch.slice, batch.slices)
            vk = rbm.gibbs(start, c.gibbs_steps, generator)
            if rbm.chains is not None:
                rbm.chains.write(batch.slice, batch.slices, vk)
            data, model = rbm.free_energy(v0).mean(), rbm.free_energy(vk).mean()
            back = rbm.visible_given(rbm.hidden_given(v0))
            value = data - model + penalty(c, rbm.W)
        scalars = {"energy/data": data, "energy/model": model, "reconstruction": F.binary_cross_entropy(back, v0)}
        return Loss(value, {k: v.detach() for k, v in scalars.items()})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("rbm",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Run fresh chains for `sampling_steps`; shown are the probabilities of the last visible units."""
        v = draw_bits(torch.sigmoid(self.rbm.a).expand(len(labels), -1), generator)
        v = self.rbm.gibbs(v, self.config.sampling_steps - 1, generator)
        h = draw_bits(self.rbm.hidden_given(v), generator)
        return as_images(self.rbm.visible_given(h), self.config)

    @property
    def likelihood_protocol(self) -> str:
        return protocol(self.config, self.config.hidden)

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:  # noqa: ARG002
        v = as_bits(batch.images, self.config.binarise, generator)
        return -self.rbm.free_energy(v).double() - self.log_z()

    def log_z(self) -> Tensor:
        """Log Z of the present weights."""
        return self._log_z.of(self.rbm, self.config)
