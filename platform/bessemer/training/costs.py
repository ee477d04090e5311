"""What one slice of an update costs: operations and memory.

Both are counted where PyTorch dispatches operations, on real tensors or on tensors without values
(``FakeTensorMode``), which need neither memory nor time and take generators like any others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from bessemer.systems.contract import Batch, System, Update
from bessemer.training.rng import generator

__all__ = ["FlopCount", "LiveBytes", "SliceCost", "slice_costs"]


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class has no types
    """Counts the floating-point operations of convolutions, matrix products and attention while it is entered.

    A multiply-add is two operations. Backward passes of any order count, because they are made of the same operations;
    what is done element by element, and products of a matrix and a vector, do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.total += _convolution_backward(*args)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Operations of the gradients of input and weight, each as many as of the convolution.

    PyTorch's own formula counts grouped convolutions as if they were dense: a depthwise one many times over.
    """
    *_, transposed, _, _, wanted = rest
    positions = (x if transposed else gradient).shape[2:].numel()
    return 2 * len(x) * positions * weight.numel() * int(sum(wanted[:2]))


class LiveBytes(FlopCount):  # type: ignore[no-untyped-call]  # torch's class has no types
    """Follows the memory of all tensors made while it is entered: what lives now, and the most that lived at once.

    What a kernel allocates for itself and frees before it returns (workspaces of convolutions) is not seen.

    Args:
        known: tensors that were there before; they and views of them do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak: int = 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._bytes:
            self._bytes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, storage: int) -> None:
        self.live -= self._bytes.pop(storage)


_FREE = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operations that touch no value, besides views."""


class _Work(LiveBytes):  # type: ignore[no-untyped-call]  # torch's class has no types
    """Counts also what says how long a device takes: its kernels, and what they move where they multiply little."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__(known)
        self.half = 0
        self.moved = 0
        self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.total
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "aten" or func.is_view or func.overloadpacket.__name__ in _FREE:
            return out
        self.kernels += 1
        flops = self.total - before
        tensors = {id(t): t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)}
        if not flops or _is_depthwise(func, args):
            self.moved += sum(t.nbytes for t in tensors.values())
        elif all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors.values()):
            self.half += flops
        return out


def _is_depthwise(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether each channel has a kernel of its own: a few products for each value, and not on matrix units."""
    backward = func.overloadpacket is torch.ops.aten.convolution_backward
    if not backward and func.overloadpacket is not torch.ops.aten.convolution:
        return False
    weight, groups = (args[2], args[9]) if backward else (args[1], args[8])
    return bool(groups > 1 and weight.shape[1] == 1)


@dataclass(frozen=True)
class SliceCost:
    """What one slice of an update costs the worker that owns it."""

    update: Update
    flops: int
    """Of the forward and the backward pass; see :class:`FlopCount`."""
    half: int
    """Of these, those of dense convolutions and matrix products in half precision."""
    moved: int
    """Bytes that all other operations read and write: normalisation, activations, depthwise convolutions, sums."""
    kernels: int
    """Operations of any kind, each of which PyTorch hands to the device by itself."""
    peak: int
    """Most bytes at once beyond weights and buffers: activations, gradients of the weights and of the activations."""
    gradients: int
    """Bytes of the gradients that the slice leaves; within `peak`."""
    forward: int
    """Most bytes at once, of the same kinds, until the loss is there."""
    calls: Mapping[str, int]
    """Forward passes through each network as a whole; a system that uses parts of a network by themselves has 0."""


def slice_costs(
    build: Callable[[], System], slice_size: int, *, accumulated: bool, half: bool, released: bool = False
) -> list[SliceCost]:
    """Costs of one slice of each update of an iteration, in the stage that computes most, without computing anything.

    Args:
        build: makes the system; called where tensors have no values.
        slice_size: images of a slice.
        accumulated: gradients of an earlier slice are there already.
        half: run forward passes in bf16, by the CPU's rules; fp16 takes the same.
        released: each gradient of a weight is taken away as soon as it is there, as ZeRO 3 does; then none is left.
    """
    with FakeTensorMode():
        system = build()
        networks = system.networks()
        if released:
            for p in (p for network in networks.values() for p in network.parameters()):
                p.register_post_accumulate_grad_hook(_release)  # type: ignore[no-untyped-call]
        stages = [
            [_cost(system, networks, u, slice_size, accumulated, half) for u in system.updates(start)]
            for start in system.stage_starts()
        ]
        return max(stages, key=lambda costs: sum(cost.flops for cost in costs))


def _release(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _counted_calls(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Forward passes through each network as a whole, meanwhile."""
    calls = dict.fromkeys(networks, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    hooks = [network.register_forward_pre_hook(count(name)) for name, network in networks.items()]
    yield calls
    for hook in hooks:
        hook.remove()


def _cost(
    system: System, networks: Mapping[str, nn.Module], update: Update, slice_size: int, accumulated: bool, half: bool
) -> SliceCost:
    for name, network in networks.items():
        network.train().requires_grad_(name == update.network)
    fields = {name: torch.empty(slice_size, *shape) for name, shape in system.batch_shapes.items()}
    batch = Batch(None, torch.zeros(slice_size, dtype=torch.int64), **fields)
    trained = list(networks[update.network].parameters())
    if accumulated:
        for p in trained:
            p.grad = torch.empty_like(p)
    held = [p.grad for p in trained if p.grad is not None]
    state = [t for network in networks.values() for t in (*network.parameters(), *network.buffers())]
    with _Work([*state, *held]) as count, _counted_calls(networks) as calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = update.loss(batch, generator("cpu", 0, update.name)).value
        forward = count.peak
        value.backward()  # type: ignore[no-untyped-call]
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    for p in trained:
        p.grad = None
    before = sum(g.nbytes for g in held)
    return SliceCost(
        update=update,
        flops=count.total,
        half=count.half,
        moved=count.moved,
        kernels=count.kernels,
        peak=count.peak + before,
        gradients=gradients,
        forward=forward + before,
        calls=calls,
    )
