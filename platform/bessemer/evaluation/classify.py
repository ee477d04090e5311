"""Classification-accuracy score: a classifier learns from generated images and is asked about real ones.

Ravuri and Vinyals, Classification Accuracy Score for Conditional Generative Models, NeurIPS 2019, arXiv:1905.10887:
the accuracy on real images that were held out says how well generated images stand for real ones. It falls with what a
model gets wrong of any class, and with classes that it mixes up or leaves out.

The paper's classifier is a ResNet on images, which `cas-resnet_pixels` is at 32 pixels. `cas_EXTRACTOR` is a logistic
regression on features: quick, and blind to what the extractor does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bessemer.errors import EvaluationError
from bessemer.training.rng import generator

__all__ = ["Accuracy", "ResNet8", "accuracy", "check_classes", "fit_linear", "fit_resnet"]

_RIDGE: Final = 0.01
_EDGE: Final = 32
_BATCH, _STEPS = 128, 2000
_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 5e-4

Features = NDArray[np.floating]
Labels = NDArray[np.int64]
Classifier = Callable[[Features], Labels]


@dataclass(frozen=True)
class Accuracy:
    """How many real images a classifier gets right."""

    value: float
    standard_error: float
    """Of the share, over the real images: that of a binomial."""
    by_class: tuple[float | None, ...]
    """None for a class without real images."""


def accuracy(found: Labels, labels: Labels, classes: int) -> Accuracy:
    """Share of `found` [n] classes that are the true `labels` [n]."""
    right = found == labels
    value = float(right.mean())
    shares = [float(right[labels == c].mean()) if (labels == c).any() else None for c in range(classes)]
    return Accuracy(value, float(np.sqrt(value * (1 - value) / len(right))), tuple(shares))


def check_classes(generated: Labels, classes: int) -> None:
    """Refuse images from which no classifier can learn.

    Raises:
        EvaluationError: fewer than two classes, or all generated images are of one.
    """
    if classes < 2 or len(np.unique(generated)) < 2:
        raise EvaluationError(
            f"classification accuracy: {classes} classes, of which {len(np.unique(generated))} are among the generated "
            "images, but a classifier needs 2; leave the metric out."
        )


def fit_linear(features: Features, labels: Labels, classes: int) -> Classifier:
    """Logistic regression: the minimum of ``mean cross-entropy + 0.01 / 2 |W|^2`` on standardised features.

    The minimum is unique, so that the order of images and the way to it do not matter. Biases are not penalised.

    Args:
        features: [n, d].
        labels: [n].
        classes: their number; those without images are never said.
    """
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(std > 0, std, 1.0)

    def standard(x: Features) -> Tensor:
        return torch.from_numpy((np.asarray(x, dtype=np.float64) - mean) / scale)

    x, y = standard(features), torch.from_numpy(np.asarray(labels))
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + _RIDGE / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        search.step(objective)  # type: ignore[no-untyped-call]
    found_weight, found_bias = weight.detach(), bias.detach()
    found_bias[~np.isin(np.arange(classes), labels)] = -torch.inf

    def classify(images: Features) -> Labels:
        said: Labels = (standard(images) @ found_weight + found_bias).argmax(1).numpy()
        return said

    return classify


class ResNet8(nn.Module):
    """Three stages of one residual block each, of 16, 32 and 64 channels: 75 thousand weights.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, section 4.2 with n = 1.

    Args:
        classes: outputs.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(_Block(16, 16), _Block(16, 32), _Block(32, 64))
        self.last = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, classes] logits of [N, 3, 32, 32] images around 0."""
        logits: Tensor = self.last(self.blocks(self.stem(x)).mean((2, 3)))
        return logits

    @torch.no_grad()
    def init_weights(self, draws: torch.Generator) -> None:
        """Normal with variance 2 / fan-out (He et al. 2015) in convolutions; the last layer starts at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[:, 0].numel()
                module.weight.normal_(0, (2 / fan) ** 0.5, generator=draws)
        self.last.weight.zero_()
        assert self.last.bias is not None
        self.last.bias.zero_()


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, self.stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        skip = x[:, :, :: self.stride, :: self.stride]  # option A of the paper: new channels are zero
        return F.relu(y + F.pad(skip, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


def fit_resnet(
    features: Features,
    labels: Labels,
    classes: int,
    *,
    seed: int = 0,
    steps: int = _STEPS,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train :class:`ResNet8` on colours at 32 pixels, with flips and shifts by up to 4 pixels as the paper's.

    Batches of 128, SGD with Nesterov momentum 0.9, weight decay 5e-4, learning rate 0.1 along half a cosine. The
    result is a function of the images, their order and the seed.

    Args:
        features: [n, 3072] colours in [0, 1], as the extractor `pixels` makes them.
        labels: [n].
        classes: their number.
        seed: of weights and batches.
        steps: of the optimizer.
        device: where it trains.
    """
    x, y = _images(features), torch.from_numpy(np.asarray(labels))
    draws = generator("cpu", seed, "classifier")
    network = ResNet8(classes)
    network.init_weights(draws)
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), _RATE, _MOMENTUM, weight_decay=_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (_BATCH,), generator=draws)
            batch = _moved(x[rows], draws).to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(network(batch), y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()

    @torch.no_grad()
    def classify(images: Features) -> Labels:
        parts = [network(part.to(device)).argmax(1).cpu() for part in torch.split(_images(images), 256)]
        said: Labels = torch.cat(parts).numpy()
        return said

    return classify


def _images(features: Features) -> Tensor:
    """[n, 3, 32, 32] around 0."""
    return torch.from_numpy(np.asarray(features, dtype=np.float32)).reshape(-1, 3, _EDGE, _EDGE).sub(0.5).div(0.25)


def _moved(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each image flipped or not, and shifted by -4 to 4 pixels, what comes in being grey."""
    n = len(images)
    flip = torch.rand(n, generator=draws) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4)).unfold(2, _EDGE, 1).unfold(3, _EDGE, 1)
    top, left = torch.randint(9, (2, n), generator=draws)
    return padded[torch.arange(n), :, top, left]
