"""StyleGAN2 (Karras et al. 2020, arXiv:1912.04958) with adaptive augmentation (Karras et al. 2020, arXiv:2006.06676).

Where the papers are silent the presets follow the configurations of the authors' PyTorch code; so do their parameter
counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from bessemer.nn.equalised import Initialised
from bessemer.nn.latents import normal_latents
from bessemer.systems.adversarial.stylegan2_networks import StyleGAN2Discriminator, StyleGAN2Generator
from bessemer.systems.contract import Batch, Clock, Loss, OptimizerDefaults, System, SystemConfig, Update

__all__ = ["StyleGAN2", "StyleGAN2Config"]

Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class StyleGAN2Config(SystemConfig):
    """Configuration of StyleGAN2; the defaults are those of config F."""

    resolution: Literal[16, 32, 64, 128, 256, 512, 1024] = 1024
    """Height and width of the images in pixels."""
    channels: Size = 3
    """Colour channels."""
    classes: Size = 1
    """Classes of the data set."""
    conditional: bool = False
    """Give the class to both networks; if not, labels are ignored."""
    latent_dim: Size = 512
    """Dimension of z."""
    w_dim: Size = 512
    """Dimension of w, and width of the mapping network."""
    mapping_layers: Size = 8
    """Layers of the mapping network."""
    mapping_lr_factor: Positive = 0.01
    """Learning rate of the mapping network relative to that of the rest."""
    channel_base: Size = 32768
    """Feature maps times resolution, until `channel_max`; 16384 halves the widths."""
    channel_max: Size = 512
    """Most feature maps of a layer."""
    discriminator: Literal["residual", "plain"] = "residual"
    """Discriminator with residual blocks, or without connections around its layers."""
    minibatch_group: Size = 4
    """Images whose standard deviation the discriminator sees; at most the slice, of which it takes a divisor."""
    half_resolutions: Annotated[int, Field(ge=0)] = 4
    """Resolutions, from the highest down, that run in the job's `training.precision`; the others stay in fp32, as 4x4
    always does."""
    clamp: Positive = 256.0
    """Bound of activations in layers that run in fp16."""
    lr: Positive = 0.002
    """Adam's learning rate in both networks, before the correction for lazy regularisation."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's decay rates in both networks, before that correction."""
    adam_eps: Positive = 1e-8
    """Adam's ε in both networks."""
    style_mixing: Share = 0.9
    """Share of generated images that are made from two latents."""
    w_average_rate: Share = 0.005
    """Share of an update's mean w in the new average w."""
    path_length_weight: Weight = 2.0
    """Weight of the path length penalty on the generator; 0 for none."""
    path_length_interval: Size = 4
    """Iterations between two path length updates; the penalty is multiplied by it (lazy regularisation)."""
    path_length_shrink: Size = 2
    """The path length penalty takes a slice divided by this, to save memory."""
    path_length_rate: Share = 0.01
    """Share of an update's mean path length in the new average."""
    r1_gamma: Weight = 10.0
    """Weight (gamma) of the R1 penalty on the discriminator; 0 for none."""
    r1_interval: Size = 16
    """Iterations between two R1 updates; the penalty is multiplied by it (lazy regularisation)."""
    augment: Literal["none", "bgc"] = "none"
    """What the discriminator's images pass through: nothing, or pixel blitting, geometry and colour."""
    augment_p: Share = 0.0
    """Probability p of augmentation at the start; adapted unless `augment_target` is null."""
    augment_target: Annotated[float, Field(gt=-1, lt=1)] | None = 0.6
    """Target of r_t = E[sign(D(real))]; null keeps p as it is."""
    augment_kimg: Positive = 500.0
    """Images, in thousands, in which p can move from 0 to 1."""
    augment_interval: Size = 4
    """Iterations between two adjustments of p."""

    @model_validator(mode="after")
    def _check(self) -> StyleGAN2Config:
        if self.conditional and self.classes == 1:
            raise ValueError("conditional true needs labels, and classes is 1; set conditional to false")
        if self.augment == "bgc" and self.channels not in (1, 3):
            raise ValueError(f"augment bgc knows colours of 1 or 3 channels, not {self.channels}; set augment to none")
        return self

    def width(self, resolution: int) -> int:
        """Feature maps at a resolution."""
        return min(self.channel_base // resolution, self.channel_max)

    def is_half(self, resolution: int) -> bool:
        """Whether layers of a resolution run in half precision if the job asks for it."""
        return resolution > 4 and resolution << self.half_resolutions > self.resolution


_PAPER = {"channel_base": 32768, "augment": "bgc", "lr": 0.0025, "minibatch_group": 8}
_AUTO = {"mapping_layers": 2, "augment": "bgc", "lr": 0.0025, "channel_base": 16384}
_CIFAR = {
    "resolution": 32, "mapping_layers": 2, "discriminator": "plain", "minibatch_group": 32, "lr": 0.0025,
    "r1_gamma": 0.01, "path_length_weight": 0.0, "style_mixing": 0.0, "augment": "bgc",
}  # fmt: skip


def _auto_gamma(resolution: int, batch_size: int) -> float:
    """γ = 0.0002 · R² / batch size (StyleGAN2-ADA, appendix C: a heuristic)."""
    return 2e-4 * resolution**2 / batch_size


class StyleGAN2(System):
    """Style-based GAN: modulated convolutions, skip generator, residual discriminator, lazy regularisation, ADA."""

    name: ClassVar[str] = "stylegan2"
    family: ClassVar[str] = "adversarial"
    paper: ClassVar[str] = (
        "T. Karras, S. Laine, M. Aittala, J. Hellsten, J. Lehtinen, T. Aila: Analyzing and Improving the Image Quality "
        "of StyleGAN, CVPR 2020, arXiv:1912.04958; with T. Karras, M. Aittala, J. Hellsten, S. Laine, J. Lehtinen, "
        "T. Aila: Training Generative Adversarial Networks with Limited Data, NeurIPS 2020, arXiv:2006.06676"
    )
    Config: ClassVar[type[SystemConfig]] = StyleGAN2Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "config-f": {},
        "paper256": {**_PAPER, "resolution": 256, "channel_base": 16384, "r1_gamma": 1.0},
        "paper512": {**_PAPER, "resolution": 512, "r1_gamma": 0.5},
        "paper1024": {**_PAPER, "r1_gamma": 2.0, "lr": 0.002, "minibatch_group": 4},
        "cifar": _CIFAR,
        "cifar-conditional": {**_CIFAR, "classes": 10, "conditional": True},
        # The heuristics of the authors' code at the batch sizes that it chooses on eight GPUs: 32 at 1024, else 64.
        "auto1024": {**_AUTO, "r1_gamma": _auto_gamma(1024, 32), "lr": 0.002, "channel_base": 32768},
        "auto512": {**_AUTO, "resolution": 512, "r1_gamma": _auto_gamma(512, 64), "channel_base": 32768},
        **{f"auto{r}": {**_AUTO, "resolution": r, "r1_gamma": _auto_gamma(r, 64)} for r in (256, 128, 64, 32)},
        "tiny32": {
            **_CIFAR, "latent_dim": 64, "w_dim": 64, "channel_base": 1024, "channel_max": 64, "minibatch_group": 8,
            "discriminator": "residual", "style_mixing": 0.9, "path_length_weight": 2.0, "augment_kimg": 50.0,
        },
    }  # fmt: skip

    config: StyleGAN2Config
    generator: StyleGAN2Generator
    discriminator: StyleGAN2Discriminator

    def __init__(self, config: Any) -> None:
        self.config = config
        self.generator = StyleGAN2Generator(config)
        self.discriminator = StyleGAN2Discriminator(config)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, OptimizerDefaults]:
        c = self.config
        return {k: OptimizerDefaults("adam", lr=c.lr, betas=c.betas, eps=c.adam_eps) for k in self.networks()}

    def updates(self, clock: Clock) -> Sequence[Update]:  # noqa: ARG002  # the same all along
        c = self.config
        lazy: dict[str, Any] = {"lazy": True, "second_order": True}
        path = Update("path_length", "generator", self.path_length_loss, interval=c.path_length_interval, **lazy)
        r1 = Update("r1", "discriminator", self.r1_loss, interval=c.r1_interval, **lazy)
        return [
            Update("generator", "generator", self.generator_loss),
            *([path] if c.path_length_weight else []),
            Update("discriminator", "discriminator", self.discriminator_loss),
            *([r1] if c.r1_gamma else []),
        ]

    def init_weights(self, generator: Generator) -> None:
        for network in self.networks().values():
            for layer in network.modules():
                if isinstance(layer, Initialised):
                    layer.init_weights(generator)

    def after_iteration(self, clock: Clock) -> None:
        """Adjust p of the augmentation."""
        c, augment = self.config, self.discriminator.augment
        if augment is not None and c.augment_target is not None and clock.iteration % c.augment_interval == 0:
            augment.adjust(c.augment_target, c.augment_kimg)

    def _ws(self, labels: Tensor, generator: Generator) -> Tensor:
        """Map random latents to [N, num_ws, w_dim], a w for each layer; some images have another from some layer on."""
        shape = (len(labels), self.config.latent_dim)
        ws = self.generator.broadcast(self.generator.map(normal_latents(shape, generator), labels))
        if not self.config.style_mixing:
            return ws
        second = self.generator.mapping(normal_latents(shape, generator), labels)
        num_ws, device = self.generator.synthesis.num_ws, generator.device
        crossover = torch.randint(1, num_ws, (len(labels),), generator=generator, device=device)
        mixed = torch.rand(len(labels), generator=generator, device=device) < self.config.style_mixing
        layers = torch.arange(num_ws, device=device)
        keep = ~mixed[:, None] | (layers < crossover[:, None])
        return torch.where(keep[:, :, None], ws, second[:, None])

    def _generate(self, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images of random latents, and their ws."""
        ws = self._ws(labels, generator)
        synthesis = self.generator.synthesis
        return synthesis(ws, synthesis.draw_noise(len(ws), generator)), ws

    def _labels(self, batch: Batch, n: int, generator: Generator) -> Tensor:
        """Classes [n] for generated images, drawn from those of the slice: in the data set's proportions."""
        return batch.labels[torch.randint(len(batch.labels), (n,), generator=generator, device=generator.device)]

    def _judge(self, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """D's scores [N] of augmented images."""
        augment = self.discriminator.augment
        scores: Tensor = self.discriminator(images if augment is None else augment(images, generator), labels)
        return scores

    def generator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Non-saturating logistic loss E[softplus(-D(G(z)))] (Goodfellow et al. 2014)."""
        labels = self._labels(batch, len(batch.images), generator)
        images, _ = self._generate(labels, generator)
        return Loss(F.softplus(-self._judge(images, labels, generator)).mean())

    def path_length_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Path length penalty E[(‖Jᵀ_w y‖₂ - a)²] (equation 4), y an image of noise, a the average length.

        For several w the squared lengths are averaged. All slices of an update share the a from before it.
        """
        c = self.config
        labels = self._labels(batch, max(1, len(batch.images) // c.path_length_shrink), generator)
        images, ws = self._generate(labels, generator)
        y = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        products = (images * y).sum() * images[0, 0].numel() ** -0.5
        (gradient,) = torch.autograd.grad(products, ws, create_graph=True)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        average = self.generator.path_length
        penalty = (lengths - average.mean).square().mean()
        average.observe(lengths.mean()[None])
        # The zero term lets parameters that the gradient does not depend on take part, as all workers must.
        value = c.path_length_interval * c.path_length_weight * penalty + 0 * images.mean()
        return Loss(value, {"penalty/path_length": penalty.detach(), "path_length": lengths.mean().detach()})

    def discriminator_loss(self, batch: Batch, generator: Generator) -> Loss:
        """Logistic loss E[softplus(D(G(z)))] + E[softplus(-D(x))]."""
        labels = self._labels(batch, len(batch.images), generator)
        with torch.no_grad():
            fakes, _ = self._generate(labels, generator)
        # Two passes: each standard deviation over the minibatch must be of real or of generated images.
        fake = self._judge(fakes, labels, generator)
        real = self._judge(batch.images, batch.labels, generator)
        value = F.softplus(fake).mean() + F.softplus(-real).mean()
        scalars = {"scores/real": real.mean().detach(), "scores/fake": fake.mean().detach()}
        if (augment := self.discriminator.augment) is not None:
            augment.observe(real)
            scalars |= {"ada/sign_real": real.detach().sign().mean(), "ada/p": augment.p[0].clone()}
        return Loss(value, scalars)

    def r1_loss(self, batch: Batch, generator: Generator) -> Loss:
        """R1 penalty interval · γ/2 · E[‖∇D(x)‖²] at real images, through augmentation (Mescheder et al. 2018)."""
        images = batch.images.detach().requires_grad_()
        scores = self._judge(images, batch.labels, generator)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        penalty = gradient.square().sum((1, 2, 3)).mean()
        value = self.config.r1_interval * self.config.r1_gamma / 2 * penalty + 0 * scores.mean()
        return Loss(value, {"penalty/r1": penalty.detach()})

    @property
    def sampled_networks(self) -> tuple[str, ...]:
        return ("generator",)

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw images; `truncation` ψ in [0, 1] pulls w towards its average, trading variety for fidelity."""
        latents = {"latents": normal_latents((len(labels), self.config.latent_dim), generator)}
        noise = self.generator.synthesis.draw_noise(len(labels), generator)
        return self.generate(latents | {f"noise_{i}": n for i, n in enumerate(noise)}, labels, truncation)

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        sizes = self.generator.synthesis.noise_sizes
        return {"latents": (self.config.latent_dim,), **{f"noise_{i}": (1, r, r) for i, r in enumerate(sizes)}}

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:
        G = self.generator
        w = latents["w"] if "w" in latents else G.mapping(latents["latents"], labels)
        noise = [latents[f"noise_{i}"] for i in range(len(G.synthesis.noise_sizes))]
        images: Tensor = G.synthesis(G.broadcast(w, truncation), noise)
        return images.float().clamp(-1, 1)

    def styles(self, latents: Mapping[str, Tensor], labels: Tensor) -> Mapping[str, Tensor]:
        noise = {name: tensor for name, tensor in latents.items() if name != "latents"}
        return {"w": self.generator.mapping(latents["latents"], labels), **noise}
