"""Batch normalisation whose running statistics move once per update.

In training each slice is normalised with its own statistics, or, after :func:`share_statistics`, with those of the
slices that all workers compute at the same moment. The running statistics take one step per update,
towards the mean over all slices of all workers, so that they do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.across_workers import gather_rows
from bessemer.nn.update_state import UpdateStateLayer

__all__ = [
    "AffineBatchNorm",
    "BatchNorm",
    "ConditionalBatchNorm",
    "renew_statistics",
    "share_statistics",
    "statistics_not_counted",
]

_counts = True
"""Whether batch statistics are counted: a plain name, because torch.compile cannot look into context variables."""


class BatchNorm(UpdateStateLayer):
    """Batch normalisation without parameters (Ioffe and Szegedy 2015, arXiv:1502.03167); the base of the others.

    Args:
        channels: C of the input [N, C, H, W] or [N, C].
        eps: added to the variance.
        momentum: share of an update's mean statistics in the new running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    sum_mean: Tensor
    sum_var: Tensor
    slices: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.workers: tuple[int, int] | None = None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("sum_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("sum_var", torch.zeros(channels), persistent=False)
        self.register_buffer("slices", torch.zeros(1), persistent=False)

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Running statistics of a layer that has seen nothing: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.begin_update()

    def begin_update(self) -> None:
        for total in self.pending():
            total.zero_()

    def pending(self) -> list[Tensor]:
        return [self.sum_mean, self.sum_var, self.slices]

    def end_update(self) -> None:
        self.commit(self.momentum)

    @torch.no_grad()
    def commit(self, momentum: float) -> None:
        """Move the running statistics by `momentum` towards the mean over the slices; nothing without slices."""
        count = self.slices.clamp(min=1)
        weight = momentum * (self.slices > 0).to(self.slices.dtype)  # a tensor: a branch would wait for the device
        self.running_mean.lerp_(self.sum_mean / count, weight)
        self.running_var.lerp_(self.sum_var / count, weight)

    def _normalise(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """Maps x to gain · (x - mean)/√(variance + eps) + bias; gain and bias broadcast to [N, C, 1, 1]."""
        if not self.training:
            scale = gain * (self.running_var + self.eps).rsqrt().view(1, -1, 1, 1)
            return torch.addcmul(bias - self.running_mean.view(1, -1, 1, 1) * scale, x, scale)
        if self.workers is not None:
            x, mean, var = self._across_workers(x, *self.workers)
            return self._counted(torch.addcmul(bias, x, gain), mean, var)
        x, mean, var = self._of_slice(x)
        return self._counted(torch.addcmul(bias, x, gain), mean, var)

    def _of_slice(
        self, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x over its own slice, with a gain and a bias per channel; also its mean and variance, [C] each."""
        # With momentum 1 the "running" statistics that F.batch_norm writes are those of this slice (and the variance
        # is the unbiased one, as in PyTorch); fresh tensors, because autograd keeps them for the backward pass.
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(x, mean, var, gain, bias, training=True, momentum=1.0, eps=self.eps)
        return out, mean, var

    def _across_workers(self, x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x over all workers' slices; also their mean and unbiased variance, [C] each.

        Means and variances of equal slices are put together as in Chan, Golub and LeVeque 1979: a sum of squares would
        lose the variance of channels whose mean is large.
        """
        of_slice = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(of_slice, (0, 2, 3), unbiased=False)
        means, variances = gather_rows(torch.cat([mean, var]), rank, size).chunk(2, dim=1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        out = (of_slice - mean.view(1, -1, 1, 1)) * (var + self.eps).rsqrt().view(1, -1, 1, 1)
        elements = size * x.numel() / self.channels
        return out.to(x.dtype), mean.detach(), var.detach() * (elements / (elements - 1))

    def _counted(self, out: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Add one slice's statistics to the sums; returns `out`."""
        if not _counts:
            return out
        with torch.no_grad():
            self.sum_mean += mean
            self.sum_var += var
            self.slices += 1
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] or vectors [N, C] -> the same shape, each channel with mean 0 and variance 1 in training.

        That is before gain and bias, where there are any.
        """
        return self._of_maps(x) if x.ndim == 4 else self._of_maps(x[:, :, None, None])[:, :, 0, 0]

    def _of_maps(self, x: Tensor) -> Tensor:
        one = x.new_ones(1, 1, 1, 1)
        return self._normalise(x, one, torch.zeros_like(one))

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"


class AffineBatchNorm(BatchNorm):
    """Batch normalisation with a gain and a bias per channel, 1 and 0 at initialisation."""

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _of_maps(self, x: Tensor) -> Tensor:
        if self.training and self.workers is None:  # in one kernel, which keeps one tensor less for the backward pass
            return self._counted(*self._of_slice(x, self.gain, self.bias))
        return self._normalise(x, self.gain.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1))


class ConditionalBatchNorm(BatchNorm):
    """Batch normalisation with gain 1 + g(condition) and bias b(condition) (BigGAN, appendix B).

    Args:
        channels: C of the input [N, C, H, W].
        gain: g, a module that maps the condition of each image to [N, C]: a linear layer without bias for a vector,
            an embedding for a class index.
        bias: b, likewise.
    """

    def __init__(
        self, channels: int, gain: nn.Module, bias: nn.Module, *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.gain, self.bias = gain, bias

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]  # takes a condition
        """[N, C, H, W] and the condition, [N, features] or [N] -> the shape of x."""
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        return self._normalise(x, gain[:, :, None, None], bias[:, :, None, None])


@contextmanager
def statistics_not_counted() -> Iterator[None]:
    """Forward passes inside normalise as ever, but leave the running statistics alone.

    For passes that repeat an earlier one, as activation checkpointing does in the backward pass.
    """
    global _counts
    before, _counts = _counts, False
    try:
        yield
    finally:
        _counts = before


def share_statistics(networks: Iterable[nn.Module], rank: int, size: int) -> None:
    """From now on batch normalisation is over the slices that all workers compute at the same moment.

    Every worker must then run the same forward and backward passes in the same order, and a run depends on the number
    of workers.

    Args:
        networks: hold the batch normalisation layers.
        rank: of this worker in torch's default process group.
        size: number of workers.
    """
    for layer in (m for network in networks for m in network.modules()):
        if isinstance(layer, BatchNorm):
            layer.workers = (rank, size) if size > 1 else None


@torch.no_grad()
def renew_statistics(network: nn.Module, forward: Callable[[], object], passes: int) -> None:
    """Standing statistics (BigGAN): running statistics become the mean over `passes` forward passes.

    Args:
        network: holds the batch normalisation layers; left in the mode it was in.
        forward: runs `network` once on fresh inputs.
        passes: forward passes in training mode.
    """
    layers = [m for m in network.modules() if isinstance(m, BatchNorm)]
    was_training = network.training
    network.train()
    for layer in layers:
        layer.begin_update()
    for _ in range(passes):
        forward()
    for layer in layers:
        layer.commit(1.0)
        layer.begin_update()
    network.train(was_training)
