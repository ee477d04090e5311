"""Where the time of a step goes, and how much of the device's arithmetic it uses.

Nothing waits for the device while training: on the CPU a part's time is read from the clock, on the GPU as the
distance between two events in its stream, which are read when a line of metrics is written.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bessemer.training.costs import FlopCount
from bessemer.training.devices import peak_flops

__all__ = ["PARTS", "StepMeter"]

PARTS = ("data", "forward", "backward", "communicate", "optimizer", "ema")
"""What a step is made of. `data` is waiting for images and copying them to the device; `communicate` is waiting for
other workers and exchanging with them, wherever in the step that happens; the rest is without it."""

_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
_MOST_EVENTS = 2048


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _has_happened(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


class StepMeter:
    """Times the parts of a step on one worker, and counts the operations of its slices.

    Parts may nest; the time of an inner part is not the outer's. What no part covers is not counted.

    Args:
        device: of this worker.
        precision: of the job; decides what the device could do at most.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._cuda = device.type == "cuda"
        self._peak = peak_flops(device, precision)
        self._current: str | None = None
        self._since = 0.0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: deque[tuple[torch.cuda.Event, str | None]] = deque()  # each with the part that begins there
        self._spare: list[torch.cuda.Event] = []
        self._flops = 0
        self.flops_per_slice: dict[str, int] = {}
        """Update -> operations of the forward and the backward pass of one slice, once one was seen."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens meanwhile as `name`, one of :data:`PARTS`."""
        outer = self._current
        self._begin(name)
        try:
            yield
        finally:
            self._begin(outer)

    def _begin(self, part: str | None) -> None:
        """`part` begins, or goes on, at this moment; what ran until now ends, or is interrupted."""
        if self._cuda:
            event = self._spare.pop() if self._spare else _new_event()
            event.record()
            self._events.append((event, part))
            if len(self._events) > _MOST_EVENTS:
                self._read_events()
        else:
            now = time.perf_counter()
            if self._current is not None:
                self._seconds[self._current] += now - self._since
            self._since = now
        self._current = part

    def _read_events(self) -> None:
        """Add up the distances between events that have happened."""
        while len(self._events) > 1 and _has_happened(self._events[1][0]):
            event, part = self._events.popleft()
            if part is not None:
                self._seconds[part] += event.elapsed_time(self._events[0][0]) / 1000
            self._spare.append(event)

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Count what DeepSpeed exchanges meanwhile as `communicate`."""
        from deepspeed.comm import comm

        backend = comm.cdb  # every collective of DeepSpeed goes through this object
        for name in _COLLECTIVES:
            setattr(backend, name, self._timed(getattr(backend, name)))
        try:
            yield
        finally:
            for name in _COLLECTIVES:
                delattr(backend, name)  # uncovers the method of the class

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part("communicate"):
                return collective(*arguments, **options)

        return timed

    @contextmanager
    def slice(self, update: str) -> Iterator[None]:
        """Count the operations of one slice of `update`: while the first one runs, from then on by its number."""
        if update not in self.flops_per_slice:
            # Compiled code hides its operations, and code that is first met while they are counted is never compiled.
            with torch.compiler.set_stance("force_eager"), FlopCount() as count:
                yield
            self.flops_per_slice[update] = count.total
        else:
            yield
        self._flops += self.flops_per_slice[update]

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each of :data:`PARTS` since the last call."""
        if self._events:
            self._events[-1][0].synchronize()
            self._read_events()
        taken = self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return taken

    def take_mfu(self, seconds: float) -> float | None:
        """Model FLOP utilisation: share of what the device could have done in the `seconds` since the last call.

        None where the device's peak is not known. PaLM (Chowdhery et al. 2022, appendix B) coined the number.
        """
        flops, self._flops = self._flops, 0
        return None if self._peak is None else flops / (self._peak * max(seconds, 1e-9))
