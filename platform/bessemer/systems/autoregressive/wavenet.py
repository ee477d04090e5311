"""WaveNet (van den Oord et al. 2016, arXiv:1609.03499): sound sample by sample, by dilated causal convolutions.

Each sample is one of 256 levels of the μ-law, and its distribution a softmax of all samples before it that the stack of
convolutions reaches. The paper gives no widths and no learning rate: they are those of the open implementation
tensorflow-wavenet (wavenet_params.json and train.py of ibab/tensorflow-wavenet: 5 times 10 layers, 32 residual, 32
gated and 512 skip channels, Adam with 1e-3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from bessemer.nn.convolutions import Conv1d
from bessemer.nn.embedding import embedding
from bessemer.nn.init import init_weights
from bessemer.nn.mu_law import mu_law_decode, mu_law_encode
from bessemer.systems.contract import BaseConfig, Batch, Clock, Loss, OptimizerDefaults, Update
from bessemer.systems.likelihood import LikelihoodSystem

__all__ = ["CachedSampler", "WaveNet", "WaveNetConfig", "WaveNetNetwork"]

Count = Annotated[int, Field(ge=1)]


class WaveNetConfig(BaseConfig):
    """Configuration of WaveNet."""

    classes: Count = 1
    """Speakers or instruments, on which every layer is conditioned globally (section 2.5); 1 for none."""
    samples: Annotated[int, Field(ge=2)] = 16000
    """Length of a piece of sound."""
    rate: Count = 16000
    """Samples per second."""
    levels: Annotated[int, Field(ge=2, le=65536)] = 256
    """Levels of the μ-law, μ + 1."""
    blocks: Count = 5
    """Times that the dilations run from 1 to 2^(layers - 1)."""
    layers: Annotated[int, Field(ge=1, le=16)] = 10
    """Layers of a block; each doubles the dilation."""
    width: Count = 32
    """Channels of the residual stream."""
    gate_width: Count = 32
    """Channels of the gated activations."""
    skip_width: Count = 512
    """Channels of the skip connections."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Adam's learning rate."""

    @property
    def dilations(self) -> list[int]:
        """Of each layer: 1, 2, 4, ..., 1, 2, 4, ..."""
        return [2**i for i in range(self.layers)] * self.blocks

    @property
    def receptive_field(self) -> int:
        """Samples before it that the distribution of a sample depends on."""
        return 2 + sum(self.dilations)


class _Layer(nn.Module):
    """z = tanh(W_f ∗ x + V_f h) ⊙ σ(W_g ∗ x + V_g h) (eq. 2, section 2.5), then 1×1 to the next layer and the skip."""

    def __init__(self, c: WaveNetConfig, dilation: int, *, last: bool) -> None:
        super().__init__()
        self.gates = Conv1d(c.width, 2 * c.gate_width, 2, dilation=dilation)
        self.condition = embedding(c.classes, 2 * c.gate_width) if c.classes > 1 else None
        self.skip = Conv1d(c.gate_width, c.skip_width)
        self.residual = None if last else Conv1d(c.gate_width, c.width)  # nobody would read the last one's

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, width, T] -> the next layer's input of the same shape, and [N, skip_width, T]."""
        a = self.gates(F.pad(x, (self.gates.dilation[0], 0)))
        if self.condition is not None:
            a = a + self.condition(labels)[:, :, None]
        f, g = a.chunk(2, 1)
        z = torch.tanh(f) * torch.sigmoid(g)
        return (x if self.residual is None else x + self.residual(z)), self.skip(z)


class WaveNetNetwork(nn.Module):
    """Maps samples [N, levels, T] -> logits of each [N, levels, T], of which one at t sees those before t alone."""

    def __init__(self, c: WaveNetConfig) -> None:
        super().__init__()
        self.first = Conv1d(c.levels, c.width, 2)
        last = len(c.dilations) - 1
        self.layers = nn.ModuleList(_Layer(c, d, last=i == last) for i, d in enumerate(c.dilations))
        self.post1, self.post2 = Conv1d(c.skip_width, c.skip_width), Conv1d(c.skip_width, c.levels)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The logits.

        Args:
            x: one-hot samples; there is silence of no level before the first.
            labels: [N].
        """
        h = self.first(F.pad(x, (2, 0))[..., :-1])
        total: Tensor | None = None
        for layer in self.layers:
            h, skip = layer(h, labels)
            total = skip if total is None else total + skip
        assert total is not None
        logits: Tensor = self.post2(F.relu(self.post1(F.relu(total))))
        return logits


class CachedSampler:
    """Computes one sample's logits from those before it: each layer keeps what its dilation will ask for again.

    The idea of Le Paine et al. 2016, arXiv:1611.09482: per sample the work of one position, not of the whole stack.
    """

    def __init__(self, network: WaveNetNetwork, labels: Tensor) -> None:
        self.net, self.at = network, 0
        weight = network.first.weight
        # A one-hot sample picks a column of each tap; row `levels` is that of no sample.
        self.taps = [F.pad(weight[:, :, tap].T, (0, 0, 0, 1)) for tap in range(2)]
        nothing = torch.full_like(labels, weight.shape[1])
        self.before, self.last = nothing, nothing
        self.memory = [
            weight.new_zeros(layer.gates.dilation[0], len(labels), weight.shape[0]) for layer in self._layers
        ]
        self.gates = [layer.gates.weight.transpose(1, 2).flatten(1) for layer in self._layers]
        self.biases = [self._bias(layer, labels) for layer in self._layers]

    @staticmethod
    def _bias(layer: _Layer, labels: Tensor) -> Tensor:
        """Of the gates of a layer and each sound, [2·gate_width] or [N, 2·gate_width]."""
        assert layer.gates.bias is not None
        return layer.gates.bias if layer.condition is None else layer.gates.bias + layer.condition(labels)

    @property
    def _layers(self) -> list[_Layer]:
        return list(self.net.layers)  # type: ignore[arg-type]

    def logits(self) -> Tensor:
        """Of the sample that comes next, [N, levels]."""
        net = self.net
        assert net.first.bias is not None
        h = net.first.bias + self.taps[0][self.before] + self.taps[1][self.last]
        total: Tensor | None = None
        for layer, memory, weight, bias in zip(self._layers, self.memory, self.gates, self.biases, strict=True):
            place = memory[self.at % len(memory)]
            f, g = (torch.cat([place, h], 1) @ weight.T + bias).chunk(2, 1)
            place.copy_(h)
            z = torch.tanh(f) * torch.sigmoid(g)
            skip = F.linear(z, layer.skip.weight[:, :, 0], layer.skip.bias)
            total = skip if total is None else total + skip
            if layer.residual is not None:
                h = h + F.linear(z, layer.residual.weight[:, :, 0], layer.residual.bias)
        assert total is not None
        h = F.relu(F.linear(F.relu(total), net.post1.weight[:, :, 0], net.post1.bias))
        return F.linear(h, net.post2.weight[:, :, 0], net.post2.bias)

    def set(self, codes: Tensor) -> None:
        """Write that sample, [N] int64."""
        self.before, self.last = self.last, codes
        self.at += 1


class WaveNet(LikelihoodSystem):
    """Autoregressive model of sound with exact likelihoods, conditioned on a class, and cached sampling."""

    name: ClassVar[str] = "wavenet"
    family: ClassVar[str] = "autoregressive"
    paper: ClassVar[str] = (
        "A. van den Oord, S. Dieleman, H. Zen, K. Simonyan, O. Vinyals, A. Graves, N. Kalchbrenner, A. Senior, "
        "K. Kavukcuoglu: WaveNet: A Generative Model for Raw Audio, 2016, arXiv:1609.03499"
    )
    modality: ClassVar[str] = "sound"
    Config: ClassVar[type[BaseConfig]] = WaveNetConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "samples": 2048, "rate": 4000, "blocks": 2, "layers": 7, "width": 16, "gate_width": 16, "skip_width": 32,
            "lr": 3e-3,
        },
        "vctk": {"classes": 109},
        "music": {},
    }  # fmt: skip
    data_fields: ClassVar[tuple[str, ...]] = ("classes", "samples", "rate")
    takes: ClassVar[tuple[str, ...]] = ("audio",)

    config: WaveNetConfig

    def __init__(self, config: WaveNetConfig) -> None:
        self.config = config
        self.wavenet = WaveNetNetwork(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"wavenet": self.wavenet}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        return {"wavenet": OptimizerDefaults("adam", lr=self.config.lr, betas=(0.9, 0.999))}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        return [Update("likelihood", "wavenet", self.loss)]

    def init_weights(self, generator: Generator) -> None:
        init_weights(self.wavenet, generator, "xavier")

    def _nats(self, batch: Batch) -> Tensor:
        """-ln p(x_t | x_1, ..., x_{t-1}, h) of each sample (eq. 3), [N, T]."""
        codes = mu_law_encode(batch["audio"], self.config.levels)
        one_hot = torch.zeros(len(codes), self.config.levels, codes.shape[1], device=codes.device)
        one_hot.scatter_(1, codes[:, None], 1.0)
        logits = self.wavenet(one_hot, batch.labels)
        return F.cross_entropy(logits.float(), codes, reduction="none")

    def loss(self, batch: Batch, generator: Generator) -> Loss:  # noqa: ARG002  # nothing is drawn
        """-Σ_t log2 p(x_t | x_1, ..., x_{t-1}, h) / T: bits per sample."""
        return Loss(self._nats(batch).mean() / math.log(2))

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("wavenet",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Draw sound sample by sample; nothing is truncated."""
        sampler, codes = CachedSampler(self.wavenet, labels), list[Tensor]()
        for _ in range(self.config.samples):
            p = torch.softmax(sampler.logits().float(), 1)
            codes.append(torch.multinomial(p, 1, generator=generator)[:, 0])
            sampler.set(codes[-1])
        return mu_law_decode(torch.stack(codes, 1), self.config.levels)

    @property
    def likelihood_protocol(self) -> str:
        return f"{self.config.levels} levels of the mu-law"

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, generator: Generator, importance_samples: int = 1) -> Tensor:  # noqa: ARG002
        return -self._nats(batch).double().sum(1)
