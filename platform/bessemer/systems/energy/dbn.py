"""Deep belief network (Hinton, Osindero and Teh 2006): RBMs, each trained on the hidden layer of the one before.

The two top layers are an RBM; below it arrows point downwards. Likelihoods are bounded as by Salakhutdinov and Murray
(2008), section 4.2. Weights are not tuned by wake and sleep afterwards. Preset `mnist` has the paper's layers without
its labels, and the 50 passes through the images for each that the authors' code has (mnistclassify.m of Hinton and
Salakhutdinov 2006); `mnist-500-2000` is that of Salakhutdinov and Murray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.binary import draw_bits
from bessemer.nn.precision import full_precision
from bessemer.nn.values import has_values
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, Stage, SystemConfig, Update
from bessemer.systems.energy.rbm import BinaryConfig, LogZ, RBMNetwork, as_bits, as_images, penalty, protocol
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["DBN", "DBNConfig"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DBNConfig(BinaryConfig):
    """Configuration of the DBN."""

    hidden: tuple[Count, ...] = (500, 500, 2000)
    """Units of each hidden layer, from the lowest."""
    layer_kimg: tuple[Positive, ...] = (3000.0, 3000.0, 3000.0)
    """Images, in thousands, for which each layer is trained; the last one until the run ends."""
    gibbs_steps: Count = 1
    """k, Gibbs steps per update (CD-k)."""

    @model_validator(mode="after")
    def _check(self) -> DBNConfig:
        if len(self.hidden) < 2 or len(self.hidden) != len(self.layer_kimg):
            raise ValueError(f"layer_kimg: name a length for each of two or more layers in hidden {list(self.hidden)}")
        return self


class _Layer(RBMNetwork):
    """An RBM of the stack, which knows whether its training has begun."""

    begun: Tensor

    def __init__(self, visible: int, hidden: int) -> None:
        super().__init__(visible, hidden)
        self.register_buffer("begun", torch.zeros(1))


def log_bits(bits: Tensor, logits: Tensor) -> Tensor:
    """Log probability of bits [N, units] from the log odds of 1, [N]."""
    return -F.binary_cross_entropy_with_logits(logits, bits, reduction="none").sum(1)


class DBN(LikelihoodSystem):
    """Deep belief network: greedy training layer by layer, samples from the two top layers downwards."""

    name: ClassVar[str] = "dbn"
    family: ClassVar[str] = "energy"
    paper: ClassVar[str] = (
        "G. E. Hinton, S. Osindero, Y.-W. Teh: A Fast Learning Algorithm for Deep Belief Nets, Neural Computation 18, "
        "2006, doi:10.1162/neco.2006.18.7.1527"
    )
    modality: ClassVar[str] = "binary images"
    Config: ClassVar[type[SystemConfig]] = DBNConfig
    init_images: ClassVar[int] = 1000
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny8": {"resolution": 8, "hidden": (64, 64), "layer_kimg": (200.0, 200.0), "gibbs_steps": 5},
        "mnist": {"resolution": 28},
        "mnist-500-2000": {"resolution": 28, "hidden": (500, 2000), "layer_kimg": (6000.0, 6000.0), "gibbs_steps": 25},
    }

    config: DBNConfig

    def __init__(self, config: DBNConfig) -> None:
        self.config = config
        self.layers = [_Layer(below, above) for below, above in pairwise([config.pixels, *config.hidden])]
        self._log_z = LogZ()

    def networks(self) -> dict[str, nn.Module]:
        return {f"rbm{i}": layer for i, layer in enumerate(self.layers, 1)}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        rule = OptimizerDefaults("sgd", lr=self.config.lr, momentum=self.config.momentum)
        return dict.fromkeys(self.networks(), rule)

    def stages(self) -> Sequence[Stage]:
        return [Stage(name, kimg) for name, kimg in zip(self.networks(), self.config.layer_kimg, strict=True)]

    def updates(self, clock: Clock) -> Sequence[Update]:
        index, _ = self.stage_of(clock)
        loss = partial(self.loss, index=index)
        return [Update(f"contrast{index + 1}", f"rbm{index + 1}", loss, whole_weights=True)]

    def after_iteration(self, clock: Clock) -> None:
        """Remember which layers there are to sample from: those whose stages have begun before `clock`."""
        for start, layer in zip(self.stage_starts(), self.layers, strict=True):
            layer.begun.fill_(float(start.nimg < clock.nimg))

    def init_weights(self, generator: Generator) -> None:
        for layer in self.layers:
            layer.init_weights(generator)
            layer.begun.zero_()
        self.layers[0].begun.fill_(1)

    def init_from_data(self, batch: Batch, generator: Generator) -> None:
        """Begin with the mean image."""
        self.layers[0].start_at(as_bits(batch.images, self.config.binarise, generator))

    @torch.no_grad()
    def _up(self, v: Tensor, layers: int, generator: Generator) -> list[Tensor]:
        """The pixels v and a draw of each of so many layers above it, from q(h_l | h_(l-1))."""
        states = [v]
        for layer in self.layers[:layers]:
            states.append(draw_bits(layer.hidden_given(states[-1]), generator))
        return states

    def loss(self, batch: Batch, generator: Generator, index: int) -> Loss:
        """CD-k of layer `index`, see the RBM; its data are bits of the layer below."""
        rbm = self.layers[index]
        with full_precision(rbm.W):
            h0 = self._up(as_bits(batch.images, self.config.binarise, generator), index, generator)[-1]
            hk = rbm.gibbs(h0, self.config.gibbs_steps, generator)
            value = rbm.free_energy(h0).mean() - rbm.free_energy(hk).mean() + penalty(self.config, rbm.W)
            back = F.binary_cross_entropy(rbm.visible_given(rbm.hidden_given(h0)), h0)
        return Loss(value, {f"reconstruction/{index + 1}": back.detach()})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return tuple(self.networks())

    @property
    def depth(self) -> int:
        """Layers whose training has begun; all of them where memory is planned without values."""
        if not all(has_values(layer.begun) for layer in self.layers):
            return len(self.layers)
        return max(1, sum(bool(layer.begun) for layer in self.layers))

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Gibbs steps in the highest layer whose training has begun, then once downwards; shown are probabilities."""
        *below, top = self.layers[: self.depth]
        h = draw_bits(torch.sigmoid(top.a).expand(len(labels), -1), generator)
        h = top.gibbs(h, self.config.sampling_steps - 1, generator)
        p = top.visible_given(draw_bits(top.hidden_given(h), generator))
        for layer in reversed(below):
            p = layer.visible_given(draw_bits(p, generator))
        return as_images(p, self.config)

    @property
    def likelihood_protocol(self) -> str:
        return protocol(self.config, self.config.hidden[self.depth - 1], f"bound of {self.depth} layers, ")

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:
        """Lower bound log (1/K) Σ_k p(v, h_k)/q(h_k | v), h_k drawn upwards; exact where one layer has begun."""
        *below, top = self.layers[: self.depth]
        v, weights = as_bits(batch.images, self.config.binarise, generator), []
        for _ in range(importance_samples):
            states = self._up(v, len(below), generator)
            log_w = -top.free_energy(states[-1]).double()
            for layer, lower, upper in zip(below, states, states[1:], strict=False):
                log_w += log_bits(lower, layer.a + upper @ layer.W.T).double()
                log_w -= log_bits(upper, layer.b + lower @ layer.W).double()
            weights.append(log_w)
        return (
            torch.logsumexp(torch.stack(weights), 0) - math.log(importance_samples) - self._log_z.of(top, self.config)
        )
