"""What an evaluation between updates needs of a worker's memory: extractors, and what drawing and judging take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import Extractor, get_extractor
from bessemer.evaluation.grid import columns_of
from bessemer.evaluation.inputs import blank_inputs
from bessemer.evaluation.names import parse_metric, split_metrics
from bessemer.evaluation.sampling import SAMPLE_CHUNK
from bessemer.spec.job import EvaluationSpec
from bessemer.systems.contract import Batch, System
from bessemer.systems.likelihood import LikelihoodSystem
from bessemer.training.costs import LiveBytes
from bessemer.training.rng import generator

__all__ = ["EvaluationCost", "evaluation_cost"]

_FP32 = 4


@dataclass(frozen=True)
class EvaluationCost:
    """Bytes that an evaluation takes."""

    extractors: int
    """Weights of the feature extractors, which stay loaded."""
    moment: int
    """The most beyond them at once: drawing a batch, or a forward pass of an extractor."""
    uncounted: tuple[str, ...]
    """Extractors that are not on this machine, so that nobody could look."""


def evaluation_cost(spec: EvaluationSpec, build: Callable[[], System], *, host: bool) -> EvaluationCost:
    """Cost of the job's evaluation for each worker. Runs each extractor once or twice; draws without computing.

    Args:
        spec: of the job.
        build: makes the system; called where tensors have no values.
        host: whether the workers are on the CPU, where extractors may cut what they are given.
    """
    with torch.device("meta"):
        system = build()
    shape = system.sample_shape
    frames, (channels, size) = math.prod(shape[:-3]), shape[-3:-1] if len(shape) > 2 else (1, 1)
    state = [system.networks()[name] for name in system.sampled_networks]
    gathered = sum(t.nbytes for network in state for t in network.state_dict().values())
    if spec.beside:  # another process judges: the workers only gather the weights
        return EvaluationCost(0, gathered, ())
    batch = max(spec.batch_size // SAMPLE_CHUNK, 1) * SAMPLE_CHUNK
    together = batch if spec.batch_size >= SAMPLE_CHUNK else spec.batch_size
    images = batch * math.prod(shape) * _FP32
    # The chunks of a batch are put together when all are drawn, so that for a moment there are two copies.
    moments = [
        gathered,
        images + _drawing(build, SAMPLE_CHUNK if spec.metrics else columns_of({system.sample_field: shape}, spec.grid)),
        2 * images,
    ]
    weights, uncounted = 0, list[str]()
    metrics = split_metrics(spec.metrics)
    if metrics.likelihoods:
        moments.append(_weighing(build, spec.importance_samples))
    wanted = [parse_metric(metric) for metric in metrics.compared]
    if any(metric.is_path for metric in wanted):  # both ends of a step are drawn at once
        moments.append(_drawing(build, 2 * SAMPLE_CHUNK))
    for name in dict.fromkeys(metric.extractor for metric in wanted):
        try:
            extractor = get_extractor(name)
        except EvaluationError:
            uncounted.append(name)
            continue
        weights += _weights(extractor)
        if host:
            judging = _judging(extractor, together * frames, channels, size)
        else:  # all at once, so a straight line through two points tells
            once, twice = (_judging(extractor, n, channels, size) for n in (1, 2))
            judging = once + (together * frames - 1) * (twice - once)
        moments.append(images + images // _FP32 + judging)
    return EvaluationCost(weights, max(moments), tuple(uncounted))


def _drawing(build: Callable[[], System], count: int) -> int:
    """Most bytes at once beyond weights while standing statistics are renewed, or `count` images drawn."""
    with FakeTensorMode(), torch.no_grad():
        system = build()
        networks = [system.networks()[name] for name in system.sampled_networks]
        sampled = nn.ModuleList(networks).eval()
        labels = torch.zeros(count, dtype=torch.int64)
        with LiveBytes([t for n in networks for t in (*n.parameters(), *n.buffers())]) as live:
            with _two_passes(networks):
                system.prepare_sampling(labels, generator("cpu", 0, "standing"))
            sampled.eval()  # the pass that was left had changed it
            with suppress(_Enough), _Limit():
                system.sample_for(blank_inputs(system, labels), generator("cpu", 0, "sample"))
    return int(live.peak)


def _weighing(build: Callable[[], System], importance_samples: int) -> int:
    """Most bytes at once beyond weights while the likelihood of a chunk of samples is taken."""
    with FakeTensorMode(), torch.no_grad():
        system = build()
        assert isinstance(system, LikelihoodSystem)
        networks = [system.networks()[name] for name in system.sampled_networks]
        nn.ModuleList(networks).eval()
        labels = torch.zeros(SAMPLE_CHUNK, dtype=torch.int64)
        fields = {name: torch.zeros(SAMPLE_CHUNK, *shape) for name, shape in system.batch_shapes.items()}
        with (
            LiveBytes([t for n in networks for t in (*n.parameters(), *n.buffers())]) as live,
            suppress(_Enough),
            _Limit(),
        ):
            batch = Batch(None, labels, **fields)
            system.log_likelihood(batch, generator("cpu", 0, "likelihood"), importance_samples)
    return int(live.peak) + sum(t.nbytes for t in fields.values())


class _Enough(Exception):  # noqa: N818  # nothing is wrong
    """A layer is used for the third time, or a chain goes on and on."""


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class has no types
    """Ends what is inside after so many operations: more steps of a chain, or pixels, take the same memory again."""

    def __init__(self, operations: int = 30_000) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _Enough
        return func(*args, **(kwargs or {}))


@contextmanager
def _two_passes(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Leave what is inside when a layer is used for the third time: further passes take the same memory again."""
    uses: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: object) -> None:
        uses[module] += 1
        if uses[module] == 3:
            raise _Enough

    hooks = [m.register_forward_pre_hook(count) for network in networks for m in network.modules()]
    try:
        yield
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _weights(extractor: Extractor) -> int:
    networks = [value for value in vars(extractor).values() if isinstance(value, nn.Module)]
    return sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))


def _judging(extractor: Extractor, count: int, channels: int, resolution: int) -> int:
    """Most bytes at once beyond weights while features of `count` images are computed."""
    images = torch.zeros(count, 3 if channels == 3 else 1, resolution, resolution, dtype=torch.uint8)
    networks = [value for value in vars(extractor).values() if isinstance(value, nn.Module)]
    with LiveBytes([images, *(t for n in networks for t in (*n.parameters(), *n.buffers()))]) as live:
        extractor.features(images)
    return int(live.peak)
