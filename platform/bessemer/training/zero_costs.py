"""What ZeRO adds to a job at each stage: memory of a worker, and bytes that it sends.

Everything here follows what DeepSpeed 0.19 does with the settings of :mod:`bessemer.training.engine`; tests compare it
with real runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from bessemer.training.costs import SliceCost
from bessemer.training.engine import BUCKET_ELEMENTS, LIVE_BUCKETS

__all__ = ["Sharding", "Sizes", "network_sizes"]

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Bytes of the fp32 weights of a network."""

    whole: int
    shard: int
    """A worker's share, padded."""
    largest: int
    """Of the largest parameter."""
    layer: int
    """Of the parameters that the largest layer itself holds."""
    bucket: int
    """Of DeepSpeed's buckets for this network."""


def network_sizes(network: nn.Module, stage: int, workers: int) -> Sizes:
    """Sizes of a network on any device, before DeepSpeed cuts it."""
    counts = [p.numel() for p in network.parameters()]
    whole = sum(counts)
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in network.modules()]
    # ZeRO 3 cuts every parameter, ZeRO 1 and 2 the whole network.
    shard = sum(-(-n // workers) for n in counts) if stage == 3 else -(-whole // workers)
    bucket = min(BUCKET_ELEMENTS, whole)
    return Sizes(*(FP32 * n for n in (whole, shard, max(counts), max(layers), bucket)))


@dataclass(frozen=True)
class Sharding:
    """A job's networks under ZeRO.

    Args:
        stage: 0 to 3.
        workers: number of them.
        slices: slices of each worker per optimizer step.
        offloads: whether optimizer states, averages and the fp32 weights that are stepped lie in the host's memory.
        sizes: by network.
    """

    stage: int
    workers: int
    slices: int
    offloads: bool
    sizes: Mapping[str, Sizes]

    def weights(self) -> int:
        """Bytes of weights between the steps, without buffers: the module's own, and the shard that is stepped."""
        stepped = 0 if self.stage == 0 or self.offloads else 1
        own = [s.shard if self.stage == 3 else s.whole for s in self.sizes.values()]
        return sum(own) + stepped * sum(s.shard for s in self.sizes.values())

    def owned(self, network: str) -> int:
        """Bytes of the weights that a worker steps."""
        return self.sizes[network].whole if self.stage == 0 else self.sizes[network].shard

    def host(self, optimizer: int, averages: int) -> int:
        """Bytes in the host's memory where the optimizer is offloaded: all of `optimizer` and `averages`, and of each
        shard the weights, their gradient, its sum over slices, and, below ZeRO 3, what goes back to the GPU.
        """
        if not self.offloads:
            return 0
        shards = sum(s.shard for s in self.sizes.values()) * (3 if self.stage == 3 else 4)
        largest = 0 if self.stage == 3 else sum(s.largest for s in self.sizes.values())
        return optimizer + averages + shards + largest

    def between_steps(self) -> dict[str, int]:
        """Bytes of gradients and buckets that are there even when nothing is trained."""
        sizes = self.sizes.values()
        through = sum(s.largest for s in sizes) if self.offloads and self.stage < 3 else 0
        if self.stage < 3:
            return {"gradients": 0, "reduction": through}
        return {
            "gradients": 0 if self.offloads else sum(s.shard for s in sizes),
            "reduction": sum(s.bucket for s in sizes),
        }

    def worst_moment(self, cost: SliceCost) -> dict[str, int]:
        """Bytes beyond what always lives, when an update needs the most: in a slice, or in the step."""
        own = self.sizes[cost.update.network]
        moments = self._scattered(cost, own) if self.stage == 3 else self._replicated(cost, own)
        return max(moments, key=lambda parts: sum(parts.values()))

    def _replicated(self, cost: SliceCost, own: Sizes) -> list[dict[str, int]]:
        """ZeRO 0, 1 and 2."""
        whole, part = own.whole, own.shard
        # ZeRO 2 reduces after every slice, and keeps the worker's share of what came before; offloaded, on the host.
        kept = part if self.stage == 2 and self.slices > 1 else whole
        in_slice = {
            "gradients": kept,
            "reduction": own.bucket if self.stage else 0,
            "gathered": 0,
            "activations": cost.peak - cost.gradients,
        }
        # The step has no activations. ZeRO 0 flattens all gradients to reduce them; ZeRO 1 does so by the bucket, and
        # copies the worker's share; and torch's optimizers need two more tensors of the size of what they step, which
        # under ZeRO is the whole share.
        in_step = {
            "gradients": part if self.stage == 2 else whole,
            "reduction": max(whole, 2 * own.largest) if self.stage == 0 else part + max(own.bucket, part),
            "gathered": 0,
            "activations": 0,
        }
        if self.offloads:  # gradients go to the host one by one, through a buffer that every network has
            through = self.between_steps()["reduction"]
            in_slice["reduction"] += through
            in_step |= {"gradients": 0 if self.stage == 2 else whole, "reduction": own.bucket + through}
        return [in_slice, in_step]

    def _scattered(self, cost: SliceCost, own: Sizes) -> list[dict[str, int]]:
        """ZeRO 3: forward pass, backward pass, the end of the backward pass, step.

        Every network always keeps its share of the gradients (unless offloaded), and a bucket. Weights are gathered a
        bucket ahead, which is there twice until all of it was used; `LIVE_BUCKETS` of them stay for the backward pass.
        """
        always = self.between_steps()
        live = sum(self._live(name, cost.calls[name]) for name in self.sizes)
        ahead = sum(s.bucket for name, s in self.sizes.items() if cost.calls[name])
        # A bucket that is full is laid out anew by worker to be sent; a network of one bucket does so at the end.
        sending = 0 if own.whole <= own.bucket else own.bucket
        step = 0 if self.offloads else 3 * own.shard  # a flat copy of the gradient, and two more of torch's optimizers
        return [
            {**always, "gathered": live + ahead, "activations": cost.forward},
            {**always, "reduction": always["reduction"] + sending, "gathered": live, "activations": cost.peak},
            {**always, "reduction": always["reduction"] + own.bucket, "gathered": live, "activations": 0},
            {**always, "reduction": always["reduction"] + step, "gathered": 0, "activations": 0},
        ]

    def _live(self, network: str, calls: int) -> int:
        """Bytes of gathered weights at once. DeepSpeed looks ahead only in networks that are called as a whole."""
        sizes = self.sizes[network]
        return min(sizes.whole, LIVE_BUCKETS * sizes.bucket + sizes.layer) if calls else sizes.layer

    def sent(self, cost: SliceCost, pending: int) -> float:
        """Bytes that a worker sends in one optimizer step, with rings: 2(W-1)/W of what is reduced to all workers,
        (W-1)/W of what is gathered or reduced to one each.

        Args:
            cost: of a slice.
            pending: bytes of per-update state that is summed over the workers.
        """
        whole = self.sizes[cost.update.network].whole
        if self.stage == 3:
            moved = self.slices * (whole + sum(self._gathered(name, cost) for name in self.sizes)) + 2 * pending
        else:
            # DeepSpeed reduces whole buckets at ZeRO 1 and 2 too (`use_multi_rank_bucket_allreduce`), at 2 after every
            # slice.
            reduced = whole * (self.slices if self.stage == 2 else 1) + pending
            moved = 2 * reduced + (whole if self.stage else 0)
        return moved * (self.workers - 1) / self.workers

    def _gathered(self, network: str, cost: SliceCost) -> int:
        """Bytes of a network that are gathered in one slice: in the backward pass again what did not stay."""
        sizes, calls = self.sizes[network], cost.calls[network]
        once = calls == 1 and sizes.whole <= LIVE_BUCKETS * sizes.bucket
        if network == cost.update.network:
            return sizes.whole if once else 2 * max(calls, 1) * sizes.whole
        return calls * sizes.whole
