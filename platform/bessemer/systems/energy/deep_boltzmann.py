"""Deep Boltzmann machine (Salakhutdinov and Hinton 2009, 2012) with two hidden layers.

First the two RBMs are trained, each with the other side doubled for the input that it will miss, and the bias of h1
with it; then all together, with a mean field for the data and persistent chains for the model. The input of h1 is then
the mean of those in the two RBMs, so its bias is the sum of theirs, as in the authors' code. Seen from the first hidden
layer the machine is an RBM: visible are the pixels and the second hidden layer. Sampling and log Z use that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from bessemer.nn.binary import draw_bits
from bessemer.nn.precision import full_precision
from bessemer.nn.slice_memory import SliceMemory
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, Stage, SystemConfig, Update
from bessemer.systems.energy.rbm import BinaryConfig, LogZ, Machine, as_bits, as_images, penalty, protocol
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["DBM", "DBMConfig", "DBMNetwork"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DBMConfig(BinaryConfig):
    """Configuration of the DBM."""

    hidden: tuple[Count, Count] = (500, 1000)
    """Units of the two hidden layers."""
    lr: Positive = 0.005
    """Learning rate of gradient descent in all stages; the paper lets it fall to 0, as `training.lr_schedule` does."""
    pretrain_kimg: tuple[Positive, Positive] = (6000.0, 6000.0)
    """Images, in thousands, for which each RBM is trained before all layers are."""
    mean_field_steps: Count = 25
    """Steps of the mean field; the authors' code has 10, or 30."""
    chains: Count = 100
    """Persistent chains, shared out over the slices."""
    gibbs_steps: Count = 5
    """Gibbs steps per update of the chains, and of contrastive divergence before."""


@dataclass
class _View(Machine):
    """The machine seen from the first hidden layer."""

    W: Tensor
    a: Tensor
    b: Tensor


class DBMNetwork(nn.Module):
    """-E(v, h1, h2) = aᵀv + (b1 + c1)ᵀh1 + b2ᵀh2 + vᵀW1h1 + h1ᵀW2h2 over bits.

    c1 is what the second RBM adds to the bias of h1; it stays as it is while all layers are trained.
    """

    def __init__(self, visible: int, hidden1: int, hidden2: int, chains: int = 0) -> None:
        super().__init__()
        self.W1, self.W2 = nn.Parameter(torch.zeros(visible, hidden1)), nn.Parameter(torch.zeros(hidden1, hidden2))
        self.a = nn.Parameter(torch.zeros(visible))
        self.b1, self.b2 = nn.Parameter(torch.zeros(hidden1)), nn.Parameter(torch.zeros(hidden2))
        self.c1 = nn.Parameter(torch.zeros(hidden1))
        self.chains = SliceMemory(chains, (visible + hidden2,))
        """Persistent chains; pixels and second hidden layer."""

    @torch.no_grad()
    def init_weights(self, generator: Generator) -> None:
        """N(0, 0.01²), biases 0; chains begin anywhere."""
        for p in (self.W1, self.W2):
            p.normal_(0, 0.01, generator=generator)
        for p in (self.a, self.b1, self.c1, self.b2):
            p.zero_()
        self.chains.values.copy_(draw_bits(torch.full_like(self.chains.values, 0.5), generator))

    @property
    def bias1(self) -> Tensor:
        """Bias of h1, which moves with b1 alone."""
        return self.b1 + self.c1.detach()

    def view(self) -> _View:
        """The RBM between (v, h2) and h1, with gradients."""
        return _View(torch.cat([self.W1, self.W2.T]), torch.cat([self.a, self.b2]), self.bias1)

    def lower(self) -> _View:
        """The first RBM: h1 sees two copies of the pixels and of its bias."""
        return _View(torch.cat([self.W1, self.W1]), torch.cat([self.a, self.a]), 2 * self.b1)

    def upper(self) -> _View:
        """The second RBM, whose visible units are h1: they see two copies of h2 and of their bias."""
        return _View(torch.cat([self.W2, self.W2], 1), 2 * self.c1, torch.cat([self.b2, self.b2]))

    def energy(self, v: Tensor, h1: Tensor, h2: Tensor) -> Tensor:
        """E(v, h1, h2), [N]; with means of independent units it is the expected energy."""
        return -(
            v @ self.a + h1 @ self.bias1 + h2 @ self.b2 + ((v @ self.W1) * h1).sum(1) + ((h1 @ self.W2) * h2).sum(1)
        )

    @torch.no_grad()
    def mean_field(self, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """μ1 and μ2 of q(h | v), one layer after the other (section 3.2): the bound rises with every step."""
        mu2 = torch.sigmoid(self.b2 + torch.sigmoid(self.bias1 + 2 * v @ self.W1) @ self.W2)
        for _ in range(steps):
            mu1 = torch.sigmoid(self.bias1 + v @ self.W1 + mu2 @ self.W2.T)
            mu2 = torch.sigmoid(self.b2 + mu1 @ self.W2)
        return mu1, mu2


def entropy(p: Tensor) -> Tensor:
    """Entropy of independent bits with probabilities p [N, units], [N] in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(1)


class DBM(LikelihoodSystem):
    """Deep Boltzmann machine: pretraining with doubled inputs, then mean field against persistent chains."""

    name: ClassVar[str] = "dbm"
    family: ClassVar[str] = "energy"
    paper: ClassVar[str] = (
        "R. Salakhutdinov, G. E. Hinton: An Efficient Learning Procedure for Deep Boltzmann Machines, Neural "
        "Computation 24, 2012, doi:10.1162/NECO_a_00311; after Deep Boltzmann Machines, AISTATS 2009"
    )
    modality: ClassVar[str] = "binary images"
    Config: ClassVar[type[SystemConfig]] = DBMConfig
    init_images: ClassVar[int] = 1000
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {
            "resolution": 8, "hidden": (64, 32), "lr": 0.02, "pretrain_kimg": (60.0, 60.0), "chains": 64,
            "mean_field_steps": 10,
        },
        "mnist": {"resolution": 28},
    }  # fmt: skip

    config: DBMConfig

    def __init__(self, config: DBMConfig) -> None:
        self.config = config
        self.dbm = DBMNetwork(config.pixels, *config.hidden, config.chains)
        self._log_z = LogZ()

    def networks(self) -> dict[str, nn.Module]:
        return {"dbm": self.dbm}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        return {"dbm": OptimizerDefaults("sgd", lr=c.lr, momentum=c.momentum)}

    def stages(self) -> Sequence[Stage]:
        first, second = self.config.pretrain_kimg
        # Momentum would carry on what rests.
        return [Stage("rbm1", first), Stage("rbm2", second, renews=("dbm",)), Stage("together", renews=("dbm",))]

    def updates(self, clock: Clock) -> Sequence[Update]:
        name, loss = [("rbm1", self.first_loss), ("rbm2", self.second_loss), ("together", self.loss)][
            self.stage_of(clock)[0]
        ]
        return [Update(name, "dbm", loss, whole_weights=True)]

    def refusal(self, slices: int) -> str | None:
        chains = self.config.chains
        return f"{chains} chains (system.config.chains) are no multiple of {slices}" if chains % slices else None

    def init_weights(self, generator: Generator) -> None:
        self.dbm.init_weights(generator)

    @torch.no_grad()
    def init_from_data(self, batch: Batch, generator: Generator) -> None:
        """Begin with the mean image, as the RBM does."""
        v = as_bits(batch.images, self.config.binarise, generator)
        self.dbm.a.copy_(torch.logit((v.sum(0) + 1) / (len(v) + 2)))

    def _resting(self) -> Tensor:
        """Zero, with a gradient of zero for all weights, as all must have one on every worker."""
        return torch.stack([0 * p.sum() for p in self.dbm.parameters()]).sum()

    def first_loss(self, batch: Batch, generator: Generator) -> Loss:
        """CD-k of the first RBM (section 3.3), of which a half is one copy's share, and its penalty."""
        d, c = self.dbm, self.config
        with full_precision(d.W1):
            v, rbm = as_bits(batch.images, c.binarise, generator), d.lower()
            x0 = torch.cat([v, v], 1)
            xk = rbm.gibbs(x0, c.gibbs_steps, generator)
            value = (rbm.free_energy(x0) - rbm.free_energy(xk)).mean() / 2
            return Loss(value + penalty(c, d.W1) + self._resting())

    def second_loss(self, batch: Batch, generator: Generator) -> Loss:
        """CD-k of the second RBM, likewise; its data are bits of h1 as the first RBM, which rests, draws them."""
        d, c = self.dbm, self.config
        with full_precision(d.W1):
            v, rbm = as_bits(batch.images, c.binarise, generator), d.upper()
            with torch.no_grad():
                h0 = draw_bits(d.lower().hidden_given(torch.cat([v, v], 1)), generator)
            hk = rbm.gibbs(h0, c.gibbs_steps, generator)
            value = (rbm.free_energy(h0) - rbm.free_energy(hk)).mean() / 2
            return Loss(value + penalty(c, d.W2) + self._resting())

    def loss(self, batch: Batch, generator: Generator) -> Loss:
        """E[E(v, μ1, μ2)] - E[F(v~, h2~)] + λ/2·Σ‖W‖², constant μ and chains: the gradient of the bound (section 3.1).

        h1 of the chains is summed out.
        """
        d, c = self.dbm, self.config
        with full_precision(d.W1):
            v, rbm = as_bits(batch.images, c.binarise, generator), d.view()
            mu1, mu2 = d.mean_field(v, c.mean_field_steps)
            x = rbm.gibbs(d.chains.read(batch.slice, batch.slices), c.gibbs_steps, generator)
            d.chains.write(batch.slice, batch.slices, x)
            data, model = d.energy(v, mu1, mu2).mean(), rbm.free_energy(x).mean()
            back = F.binary_cross_entropy(torch.sigmoid(d.a + mu1 @ d.W1.T), v)
            value = data - model + penalty(c, d.W1, d.W2) + self._resting()
        scalars = {"energy/data": data, "energy/model": model, "reconstruction": back}
        return Loss(value, {k: s.detach() for k, s in scalars.items()})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("dbm",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Run fresh chains for `sampling_steps`; shown are the probabilities of the pixels given the last h1."""
        rbm, visible = self.dbm.view(), self.config.pixels
        x = draw_bits(torch.sigmoid(rbm.a).expand(len(labels), -1), generator)
        x = rbm.gibbs(x, self.config.sampling_steps - 1, generator)
        h1 = draw_bits(rbm.hidden_given(x), generator)
        return as_images(rbm.visible_given(h1)[:, :visible], self.config)

    @property
    def likelihood_protocol(self) -> str:
        return protocol(self.config, self.config.hidden[0], "mean-field bound, ")

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:  # noqa: ARG002
        """Lower bound -E(v, μ1, μ2) + H(q) - log Z."""
        v = as_bits(batch.images, self.config.binarise, generator)
        return self.bound(v, self.config.mean_field_steps)

    def bound(self, v: Tensor, steps: int) -> Tensor:
        """That bound after so many steps of the mean field, [N] float64."""
        mu1, mu2 = self.dbm.mean_field(v, steps)
        bound = -self.dbm.energy(v, mu1, mu2) + entropy(mu1) + entropy(mu2)
        return bound.double() - self.log_z()

    @torch.no_grad()
    def log_z(self) -> Tensor:
        """Log Z of the present weights; estimated once for them, from its own seed."""
        return self._log_z.of(self.dbm.view(), self.config, self.dbm.parameters())
