"""The System contract: what a generative method must say about itself to be trained here.

A system knows its networks, its losses and its sampler. It knows nothing of DeepSpeed, Ray, ranks or files.
Losses are means over the slice, and every random number comes from the generator that is handed in, so that
the same run happens on any number of workers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor, nn

__all__ = [
    "BaseConfig",
    "Batch",
    "Clock",
    "Loss",
    "OptimizerDefaults",
    "Stage",
    "System",
    "SystemConfig",
    "Update",
]


@dataclass(frozen=True)
class Clock:
    """The image clock."""

    nimg: int
    """Real images seen so far."""
    iteration: int
    """Passes through the list of updates so far; intervals count these."""

    @property
    def kimg(self) -> float:
        return self.nimg / 1000

    def crossed(self, every_kimg: float, before: Clock) -> bool:
        """Whether the clock passed a multiple of `every_kimg` since `before`."""
        every = every_kimg * 1000
        return int(self.nimg // every) > int(before.nimg // every)


class Batch:
    """One slice of real data: fields by name, and a class for each sample.

    ========= ======================================================================================
    images    [N, C, H, W] float32 in [-1, 1]: images, the inputs of pairs, the first of two domains
    targets   [N, C, H, W] likewise: what belongs to the images of pairs
    others    [N, C, H, W] likewise: images of the second domain, which belong to nothing
    clips     [N, T, C, H, W] float32 in [-1, 1]: the frames of videos
    audio     [N, samples] float32 in [-1, 1): sound, one channel
    bits      [N, bits] float32, each 0 or 1
    ========= ======================================================================================

    Args:
        images: the field of this name; None where there is none.
        labels: [N], int64 class indices; zeros where the data set has one class.
        slice_index: which slice of the global batch this is: state that outlives an update (persistent chains, image
            pools) is kept per slice, so that it does not depend on the number of workers.
        slices: slices of the global batch.
        fields: the others.
    """

    def __init__(
        self, images: Tensor | None, labels: Tensor, slice_index: int = 0, slices: int = 1, /, **fields: Tensor
    ):
        self._fields = fields if images is None else {"images": images, **fields}
        self.labels = labels
        self.slice, self.slices = slice_index, slices

    @property
    def images(self) -> Tensor:
        """[N, C, H, W], float32 in [-1, 1]."""
        return self["images"]

    @property
    def names(self) -> tuple[str, ...]:
        """Fields that there are, the main one first."""
        return tuple(self._fields)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._fields:
            raise KeyError(f"the batch has no field {name!r}; it has {', '.join(self.names)}")
        return self._fields[name]

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        """The batch on `device`, its images laid out as asked."""
        moved = {}
        for name in self.names:
            values = self[name]
            layout = memory_format if values.ndim == 4 else torch.preserve_format
            moved[name] = values.to(device, memory_format=layout)
        return Batch(None, self.labels.to(device), self.slice, self.slices, **moved)

    def as_slice(self, index: int, slices: int) -> Batch:
        """The same samples as slice `index` of so many."""
        return Batch(None, self.labels, index, slices, **{name: self[name] for name in self.names})


@dataclass(frozen=True)
class Loss:
    """What a loss function returns."""

    value: Tensor
    """Scalar to minimise: a mean over the slice."""
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars for the journal, without dimensions, such as `scores/real`; means over the slice."""


@dataclass(frozen=True)
class OptimizerDefaults:
    """Optimizer of one network as the paper sets it."""

    name: Literal["adam", "adamax", "rmsprop", "sgd", "lamb", "lars"] = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    trust: float = 1e-3


@dataclass(frozen=True)
class Update:
    """One optimizer step of one network from one loss.

    All other networks are frozen meanwhile: they take part in the graph but collect no gradients.
    """

    name: str
    """Unique in the system; also the purpose from which its random numbers are drawn."""
    network: str
    """Key of :meth:`System.networks` whose optimizer steps."""
    loss: Callable[[Batch, Generator], Loss]
    """Loss of one slice."""
    interval: int = 1
    """Runs in iterations whose number is a multiple of this (lazy regularisers)."""
    lazy: bool = False
    """Whether this regulariser adds steps to those of the network's main loss. The optimizer that they share is
    corrected for it: with one more step every k iterations lr becomes c·lr and each decay rate β^c, c = k/(k + 1)
    (StyleGAN2, arXiv:1912.04958, appendix B)."""
    repeats: int = 1
    """Optimizer steps per iteration, each with its own real batch (n_critic)."""
    second_order: bool = False
    """Whether the loss differentiates a gradient (R1, path length, WGAN-GP)."""
    whole_weights: bool = False
    """Whether the loss reads weights outside the forward pass of their layer (spectral regularisation)."""


@dataclass(frozen=True)
class Stage:
    """A part of a run with updates of its own: a layer of a DBN, a resolution of ProGAN, the prior of a VQ-VAE."""

    name: str
    kimg: float = math.inf
    """Length in thousands of images; the last stage lasts until the run ends, whatever this says."""
    renews: tuple[str, ...] = ()
    """Networks whose optimizers forget their moments and step counts as the stage begins."""


class BaseConfig(BaseModel):
    """Base of every system's configuration, to which systems add their own fields; of sound and bits as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    classes: int = 1
    """Classes; 1 for data without labels."""


class SystemConfig(BaseConfig):
    """Configuration of a system whose data are pictures: images, or clips of them."""

    resolution: int
    """Height and width of the images in pixels."""
    channels: int = 3
    """Colour channels."""


def _picture(config: Any, channels: int | None = None) -> tuple[int, ...]:
    return (config.channels if channels is None else channels, config.resolution, config.resolution)


_SHAPES: Mapping[str, Callable[[Any], tuple[int, ...]]] = {
    "images": _picture,
    "targets": lambda config: _picture(config, getattr(config, "target_channels", None)),
    "others": _picture,
    "clips": lambda config: (config.frames, *_picture(config)),
    "audio": lambda config: (config.samples,),
    "bits": lambda config: (config.bits,),
}


class System(ABC):
    """A generative method. Subclasses build their networks in `__init__` from the configuration alone."""

    name: ClassVar[str]
    """Key in the registry."""
    family: ClassVar[str]
    """Room of the taxonomy: adversarial, flow, energy, ..."""
    paper: ClassVar[str]
    """Citation: authors, title, venue, year, arXiv number."""
    modality: ClassVar[str] = "images"
    """What its data are, for people."""
    Config: ClassVar[type[BaseConfig]]
    """Configuration model."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Preset name -> fields of :attr:`Config`; the first is the default of `bessemer systems show`."""
    data_fields: ClassVar[tuple[str, ...]] = ("channels", "classes")
    """Fields of :attr:`Config` that are taken from the data set unless the job sets them: of `channels`, `classes`,
    `target_channels` (pairs), `frames` (clips), `samples` and `rate` (sound), `bits`."""
    takes: ClassVar[tuple[str, ...]] = ("images",)
    """Fields of a batch that the losses read, as the data set must have them. Samples are like the last one."""
    given: ClassVar[tuple[str, ...]] = ()
    """Those of :attr:`takes` that a sample is made from; none, as here, where noise and a class are enough."""

    init_images: ClassVar[int] = 0
    """Images from which :meth:`init_from_data` sets initial weights; 0, as here, where data play no part in them."""

    config: BaseConfig

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Modules that are optimised together, by name; one optimizer and one engine each."""

    @abstractmethod
    def optimizers(self) -> dict[str, OptimizerDefaults]:
        """The paper's optimizer of each network of :meth:`networks`."""

    @abstractmethod
    def updates(self, clock: Clock) -> Sequence[Update]:
        """Updates of one iteration, in order; intervals are applied by the trainer."""

    def stages(self) -> Sequence[Stage]:
        """The stages of a run, in order. One, as here, for most systems."""
        return [Stage("training")]

    def stage_starts(self) -> list[Clock]:
        """The moment at which each stage begins, at iteration 0."""
        lengths = [stage.kimg for stage in self.stages()[:-1]]
        return [Clock(round(kimg * 1000), 0) for kimg in accumulate(lengths, initial=0.0)]

    def stage_of(self, clock: Clock) -> tuple[int, float]:
        """Index of the stage at a moment, and thousands of images since it began."""
        starts = [start.nimg for start in self.stage_starts()]
        index = sum(start <= clock.nimg for start in starts) - 1
        return index, (clock.nimg - starts[index]) / 1000

    def renewed(self, before: Clock, now: Clock) -> tuple[str, ...]:
        """Networks whose optimizers begin anew `now`, if a stage began after `before`."""
        (old, _), (new, _) = self.stage_of(before), self.stage_of(now)
        return self.stages()[new].renews if new != old else ()

    def every_update(self) -> list[Update]:
        """The updates of all stages, each as it is when its stage begins."""
        return [update for start in self.stage_starts() for update in self.updates(start)]

    @abstractmethod
    def init_weights(self, generator: Generator) -> None:
        """Draw all initial weights and buffers from `generator`, in place."""

    def init_from_data(self, batch: Batch, generator: Generator) -> None:
        """Set initial weights by what the networks do to real images; after :meth:`init_weights`.

        Args:
            batch: the first :attr:`init_images` of the run's first global batch, the same on every worker.
            generator: source of noise, on the device of the networks.
        """

    def refusal(self, slices: int) -> str | None:  # noqa: ARG002  # most do not mind
        """Why the batch cannot be cut into so many slices, for people; None, as here, where it can."""
        return None

    @property
    @abstractmethod
    def sampled_networks(self) -> tuple[str, ...]:
        """Networks that :meth:`sample` needs; their moving averages make up a snapshot."""

    @abstractmethod
    def sample(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw images, clips or sound with the networks as they are (the caller sets eval mode and weights).

        Args:
            labels: [N] int64 class of each sample.
            generator: source of the latents, on the device of the networks.
            truncation: bound or scale of the latents, as the system documents; ``None`` for none.

        Returns:
            [N, *sample_shape] float32 in [-1, 1], as the field :attr:`sample_field` of a batch; without a gradient.
        """

    def sample_for(self, batch: Batch, generator: Generator, truncation: float | None = None) -> Tensor:
        """Draw a sample for each of `batch`: of its class, as here, or made from its fields :attr:`given`.

        Args:
            batch: labels, and the fields that are given; others are not looked at.
            generator, truncation: as for :meth:`sample`.

        Returns:
            As of :meth:`sample`, one for each of the batch.
        """
        return self.sample(batch.labels, generator, truncation)

    @property
    def batch_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one sample in each field of :attr:`takes`, as the configuration has it."""
        return {name: _SHAPES[name](self.config) for name in self.takes}

    @property
    def sample_field(self) -> str:
        """Field of a batch that samples are like."""
        return self.takes[-1]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: [C, H, W] images, [T, C, H, W] clips, [samples] sound, [bits]."""
        return self.batch_shapes[self.sample_field]

    @property
    def latent_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of one image's latents, by name, all of them standard normal: what :meth:`generate` takes.

        The first is z, along which paths through the images lead; others stay as they are meanwhile.
        Empty, as here, where an image is no function of such latents: of a Markov chain, or pixel by pixel.
        """
        return {}

    @property
    def draws_pixels(self) -> bool:
        """Whether :meth:`sample` ends by drawing pixels from p(x | z), of which :meth:`generate` gives the mean."""
        return False

    def generate(self, latents: Mapping[str, Tensor], labels: Tensor, truncation: float | None = None) -> Tensor:
        """Images of given latents: the part of :meth:`sample` that draws nothing, which can be exported as ONNX.

        Args:
            latents: name of :attr:`latent_shapes` -> [N, *shape] float32, truncated already if that is all there is to
                truncation.
            labels: [N] int64.
            truncation: for systems that truncate something else (ψ of StyleGAN2's w).

        Returns:
            [N, *sample_shape] float32 in [-1, 1]. The batch size is left open only if it is read as `x.shape[0]`:
            `len(x)` would make a constant of it.
        """
        raise NotImplementedError(f"{self.name} has no latents")

    def styles(self, latents: Mapping[str, Tensor], labels: Tensor) -> Mapping[str, Tensor] | None:  # noqa: ARG002
        """`latents` with z replaced by the w that the generator maps it to first, which :meth:`generate` takes as well.

        None, as here, where there is no such mapping. It draws nothing.

        Args:
            latents: name of :attr:`latent_shapes` -> [N, *shape].
            labels: [N] int64.

        Returns:
            name -> [N, ...]; w comes first, and noise stays as it is.
        """
        return None

    def prepare_sampling(self, labels: Tensor, generator: Generator, truncation: float | None = None) -> None:
        """Renew what sampling depends on besides weights (standing statistics), with `labels` [N] to draw from."""

    def after_iteration(self, clock: Clock) -> None:
        """Move state on the image clock (ADA p, KL warm-up); same inputs on every worker."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state that is neither parameter nor buffer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
