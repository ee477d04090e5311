"""VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937) and VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446).

First the auto-encoder is trained, its codebooks by moving averages, then priors of its codes. Both papers' priors are
autoregressive; here they are the network of PixelCNN++ with a softmax over the codes, without the attention that
VQ-VAE-2 adds at its top level. Their widths, rates and lengths are ours, and far below those of VQ-VAE-2. They see
class and codes above where their stream begins, once. They start as drawn: PixelCNN++'s pass over the first images made
them no better (1.61 bits per code instead of 1.54 after 300 batches of digits). Errors are means over values of pixels
in [-1, 1], as in public ports.
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

from bessemer.nn.codebook import Codebook
from bessemer.nn.convolutions import Conv2d, DoublingConv2d, HalvingConv2d
from bessemer.nn.embedding import embedding
from bessemer.nn.init import init_weights
from bessemer.systems.autoregressive.pixelcnnpp import CachedSampler, PixelCNNPPNetwork
from bessemer.systems.autoregressive.shifted import ShiftedConv2d, ShiftedDeconv2d
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, Stage, System, SystemConfig, Update

__all__ = ["VQVAE", "VQVAEConfig", "VQVAENetwork"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class VQVAEConfig(SystemConfig):
    """Configuration of VQ-VAE and VQ-VAE-2."""

    resolution: Count = 32
    """Height and width of the images in pixels; a multiple of 16, of 32 with two levels."""
    channels: Count = 3
    """Colour channels."""
    classes: Count = 1
    """Classes; the priors see them where there are more than one."""
    levels: Annotated[int, Field(ge=1, le=2)] = 1
    """Maps of codes: at a quarter of the resolution, and with two levels another at an eighth above it (VQ-VAE-2)."""
    width: Count = 256
    """Channels of encoders and decoders."""
    residual_width: Count = 256
    """Channels within their residual blocks."""
    residual_blocks: Count = 2
    """Residual blocks in each of them."""
    codes: Count = 512
    """K, codes of each codebook."""
    code_dim: Count = 64
    """D, dimension of a code."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the codebooks' moving averages."""
    commitment: Positive = 0.25
    """Weight of the commitment loss."""
    lr: Positive = 2e-4
    """Adam's learning rate of the auto-encoder; the second paper does not say, ports have 3e-4."""
    autoencoder_kimg: Positive = 32000.0
    """Images, in thousands, for which the auto-encoder is trained; after them, the priors until the run ends. The first
    paper has 250,000 steps of 128 (section 4.1), the second 2,207,444 on ImageNet (appendix A)."""
    prior_width: Count = 128
    """Channels of the priors."""
    prior_layers: Count = 5
    """Gated residual layers of the priors at each resolution."""
    prior_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of features dropped in the priors."""
    prior_lr: Positive = 3e-4
    """Adam's learning rate of the priors."""

    @model_validator(mode="after")
    def _check(self) -> VQVAEConfig:
        unit = 8 << self.levels
        if self.resolution % unit:
            raise ValueError(f"resolution: {self.resolution} is no multiple of {unit}, which {self.levels} levels need")
        return self


class _Residual(nn.Module):
    """x + 1×1(ReLU(3×3(ReLU(x))))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv2d(width, hidden), Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return out


def _residuals(c: VQVAEConfig) -> list[nn.Module]:
    return [*[_Residual(c.width, c.residual_width) for _ in range(c.residual_blocks)], nn.ReLU()]


def _encoder(c: VQVAEConfig, inputs: int, halvings: int) -> nn.Sequential:
    """[N, inputs, H, W] -> [N, width, H/2^halvings, W/2^halvings]."""
    half = c.width // 2
    sizes = [inputs, half, c.width][: halvings + 1]
    down = [m for a, b in pairwise(sizes) for m in (HalvingConv2d(a, b), nn.ReLU())]
    return nn.Sequential(*down, Conv2d(sizes[-1], c.width), *_residuals(c))


def _decoder(c: VQVAEConfig, inputs: int, outputs: int, doublings: int) -> nn.Sequential:
    """[N, inputs, H, W] -> [N, outputs, 2^doublings·H, 2^doublings·W]."""
    half = c.width // 2
    up = [DoublingConv2d(c.width, outputs)]
    if doublings == 2:
        up = [DoublingConv2d(c.width, half), nn.ReLU(), DoublingConv2d(half, outputs)]  # type: ignore[list-item]
    return nn.Sequential(Conv2d(inputs, c.width), *_residuals(c), *up)


class VQVAENetwork(nn.Module):
    """Encoder, codebooks and decoder (figure 1; figure 2a of VQ-VAE-2)."""

    def __init__(self, c: VQVAEConfig) -> None:
        super().__init__()
        dim, self.levels = c.code_dim, c.levels
        self.encode_bottom = _encoder(c, c.channels, 2)
        self.codebooks = nn.ModuleList(Codebook(c.codes, dim, decay=c.decay) for _ in range(c.levels))
        if c.levels == 2:
            self.encode_top = _encoder(c, c.width, 1)
            self.to_top = Conv2d(c.width, dim, 1)
            self.decode_top = _decoder(c, dim, dim, 1)
            self.double_top = DoublingConv2d(dim, dim)
        self.to_bottom = Conv2d(c.width + (dim if c.levels == 2 else 0), dim, 1)
        self.decode_bottom = _decoder(c, c.levels * dim, c.channels, 2)

    def encode(self, x: Tensor, *, observe: bool = False) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Codes [N, D, h, w] and their indices [N, h, w], top first, and the commitment loss.

        Args:
            x: images.
            observe: let the codebooks move towards what they quantise.
        """
        h, commitment = self.encode_bottom(x), x.new_zeros(())
        quantised: list[Tensor] = []
        indices: list[Tensor] = []
        steps = [(self.codebooks[-1], h)]
        if self.levels == 2:
            steps.insert(0, (self.codebooks[0], self.encode_top(h)))
        for level, (codebook, features) in enumerate(steps):
            if level == self.levels - 1:
                more = [self.decode_top(quantised[0])] if self.levels == 2 else []
                z = self.to_bottom(torch.cat([*more, features], 1))
            else:
                z = self.to_top(features)
            e, index, loss = codebook(z)
            if observe:
                codebook.observe(z, index)  # type: ignore[operator]
            quantised.append(e)
            indices.append(index)
            commitment = commitment + loss
        return quantised, indices, commitment

    def decode(self, quantised: Sequence[Tensor]) -> Tensor:
        """Images of codes, top first: [N, C, R, R]."""
        if self.levels == 2:
            quantised = [torch.cat([self.double_top(quantised[0]), quantised[1]], 1)]
        out: Tensor = self.decode_bottom(quantised[0])
        return out

    def look_up(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """Codes of indices."""
        return [codebook.look_up(index) for codebook, index in zip(self.codebooks, indices, strict=True)]  # type: ignore[operator]


class CodePrior(nn.Module):
    """p(code | earlier codes, codes of the level above, class), one map of codes after the other."""

    def __init__(self, c: VQVAEConfig, *, above: bool) -> None:
        super().__init__()
        f = c.prior_width
        self.codes = embedding(c.codes, f)
        self.pixelcnn = PixelCNNPPNetwork(f, c.codes, width=f, layers=c.prior_layers, dropout=c.prior_dropout)
        self.classes = embedding(c.classes, f) if c.classes > 1 else None
        self.above = embedding(c.codes, f) if above else None
        self.mix = Conv2d(f, f) if above else None

    def init_weights(self, generator: Generator) -> None:
        """PixelCNN++'s layers as that system draws them, the others uniformly."""
        for part in (self.codes, self.classes, self.above, self.mix):
            if part is not None:
                init_weights(part, generator, "uniform")
        for layer in self.pixelcnn.modules():
            if isinstance(layer, (ShiftedConv2d, ShiftedDeconv2d)):
                layer.init_weights(generator)

    def condition(self, labels: Tensor, above: Tensor | None) -> Tensor | None:
        """What every position sees: [N, width, h, w], or [N, width, 1, 1] without a level above."""
        found = None if self.classes is None else self.classes(labels)[:, :, None, None]
        if self.above is not None:
            assert above is not None
            assert self.mix is not None
            seen = self.mix(F.interpolate(self.above(above).movedim(-1, 1), scale_factor=2.0, mode="nearest"))
            found = seen if found is None else found + seen
        return found

    def forward(self, index: Tensor, labels: Tensor, above: Tensor | None, generator: Generator | None) -> Tensor:
        """Log odds of the codes: indices [N, h, w] -> [N, K, h, w]."""
        x = self.codes(index).movedim(-1, 1)
        out: Tensor = self.pixelcnn(x, generator, self.condition(labels, above))
        return out

    @torch.no_grad()
    def sample(self, labels: Tensor, above: Tensor | None, side: int, generator: Generator) -> Tensor:
        """Draw a map of codes, [N, side, side] int64."""
        index = torch.zeros(len(labels), side, side, dtype=torch.int64, device=labels.device)
        condition = self.condition(labels, above)
        if condition is not None:
            condition = condition.expand(-1, -1, side, side)
        sampler = CachedSampler(self.pixelcnn, len(labels), side, condition)
        for row in range(side):
            for column in range(side):
                logits = sampler.parameters(row, column)[:, :, 0, 0].float()
                u = torch.rand(logits.shape, generator=generator, device=generator.device, dtype=torch.float64)
                gumbel = -torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-12)))
                index[:, row, column] = (logits + gumbel).argmax(1)  # the Gumbel-max trick
                pixel = self.codes(index[:, row : row + 1, column : column + 1]).movedim(-1, 1)
                sampler.set(pixel, row, column)
        return index


_TWO = {"levels": 2, "width": 128, "residual_width": 64, "lr": 3e-4}


class VQVAE(System):
    """Auto-encoder with a discrete code, and autoregressive priors of the codes; VQ-VAE-2 with two levels."""

    name: ClassVar[str] = "vqvae"
    family: ClassVar[str] = "autoencoding"
    paper: ClassVar[str] = (
        "A. van den Oord, O. Vinyals, K. Kavukcuoglu: Neural Discrete Representation Learning, NIPS 2017, "
        "arXiv:1711.00937; with A. Razavi, A. van den Oord, O. Vinyals: Generating Diverse High-Fidelity Images with "
        "VQ-VAE-2, NeurIPS 2019, arXiv:1906.00446"
    )
    Config: ClassVar[type[SystemConfig]] = VQVAEConfig
    init_images: ClassVar[int] = 64
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny32": {
            "channels": 1, "width": 32, "residual_width": 16, "residual_blocks": 1, "codes": 64, "code_dim": 16,
            "lr": 2e-3, "autoencoder_kimg": 20.0, "prior_width": 24, "prior_layers": 1, "prior_lr": 1e-3,
        },
        "cifar10": {},
        "imagenet256-2": {**_TWO, "resolution": 256, "classes": 1000, "autoencoder_kimg": 282553.0},
    }  # fmt: skip

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        self.config = config
        self.vqvae = VQVAENetwork(config)
        self.priors = [CodePrior(config, above=level > 0) for level in range(config.levels)]

    @property
    def _names(self) -> list[str]:
        return ["prior"] if self.config.levels == 1 else ["prior_top", "prior_bottom"]

    def networks(self) -> dict[str, nn.Module]:
        return {"vqvae": self.vqvae, **dict(zip(self._names, self.priors, strict=True))}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        rates = {"vqvae": c.lr, **dict.fromkeys(self._names, c.prior_lr)}
        return {name: OptimizerDefaults("adam", lr=lr, betas=(0.9, 0.999)) for name, lr in rates.items()}

    def stages(self) -> Sequence[Stage]:
        return [Stage("auto-encoder", self.config.autoencoder_kimg), Stage("prior")]

    def updates(self, clock: Clock) -> Sequence[Update]:
        if self.stage_of(clock)[0] == 0:
            return [Update("reconstruction", "vqvae", self.loss)]
        return [Update(name, name, partial(self.prior_loss, level=i)) for i, name in enumerate(self._names)]

    def init_weights(self, generator: Generator) -> None:
        init_weights(self.vqvae, generator, "uniform")
        for layer in self.vqvae.modules():
            if isinstance(layer, Codebook):
                layer.init_weights(generator)
        for prior in self.priors:
            prior.init_weights(generator)

    @torch.no_grad()
    def init_from_data(self, batch: Batch, generator: Generator) -> None:
        """Codes begin at vectors that the encoder makes of these images; the paper leaves their start open."""
        vectors: list[Tensor] = []
        books = [layer for layer in self.vqvae.modules() if isinstance(layer, Codebook)]
        hooks = [layer.register_forward_hook(lambda m, args, out: vectors.append(args[0])) for layer in books]
        for level, layer in enumerate(books):
            vectors.clear()
            self.vqvae.encode(batch.images)
            flat = vectors[level].movedim(1, -1).reshape(-1, self.config.code_dim).float()
            chosen = torch.randint(len(flat), (self.config.codes,), generator=generator, device=generator.device)
            spread = flat.std() * torch.randn(flat[chosen].shape, generator=generator, device=generator.device)
            layer.start_at(flat[chosen] + 0.1 * spread)
        for hook in hooks:
            hook.remove()

    def loss(self, batch: Batch, generator: Generator) -> Loss:  # noqa: ARG002  # draws nothing
        """E(x - x̂)² + β·E(z - sg[e])² (eq. 3 without its second term, which the moving averages replace)."""
        quantised, indices, commitment = self.vqvae.encode(batch.images, observe=self.vqvae.training)
        mse = (self.vqvae.decode(quantised).float() - batch.images).square().mean()
        scalars = {"reconstruction/mse": mse, "commitment": commitment}
        for index, level in zip(indices, self._names, strict=True):
            p = F.one_hot(index.flatten(), self.config.codes).float().mean(0)
            scalars[f"perplexity/{level}"] = torch.exp(-torch.xlogy(p, p).sum())
        return Loss(mse + self.config.commitment * commitment, {k: v.detach() for k, v in scalars.items()})

    def prior_loss(self, batch: Batch, generator: Generator, level: int) -> Loss:
        """-log p(codes of a level | codes above, class) in bits per code."""
        with torch.no_grad():
            _, indices, _ = self.vqvae.encode(batch.images)
        above = indices[level - 1] if level else None
        logits = self.priors[level](indices[level], batch.labels, above, generator)
        return Loss(F.cross_entropy(logits.float(), indices[level]) / math.log(2))

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return tuple(self.networks())

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:  # noqa: ARG002
        """Draw the codes, from the top downwards, and decode them."""
        indices: list[Tensor] = []
        for level, prior in enumerate(self.priors):
            side = self.config.resolution >> (2 + self.config.levels - 1 - level)
            indices.append(prior.sample(labels, indices[-1] if indices else None, side, generator))
        return self.vqvae.decode(self.vqvae.look_up(indices)).float().clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, batch: Batch, generator: Generator) -> Tensor:  # noqa: ARG002
        """Encode images and decode their codes: [N, C, R, R] in [-1, 1]."""
        return self.vqvae.decode(self.vqvae.encode(batch.images)[0]).float().clamp(-1, 1)
