"""How fast a system draws images: throughput in batches, and latency of a single one.

Both are facts about a machine as much as about a system. A record names the hardware, and values of different hardware
are never ranked together.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from bessemer.evaluation.inputs import blank_inputs
from bessemer.evaluation.names import SPEEDS
from bessemer.evaluation.records import weights_name
from bessemer.evaluation.sampling import allocate_labels, prepare, sampling_mode, to_stored
from bessemer.systems.contract import Batch, System
from bessemer.training.rng import generator

__all__ = ["SpeedRecord", "hardware_name", "measure_speed"]

_WARM_UP: Final = 2
_ROUNDS: Final = 20
_LEAST: Final = 3
_SECONDS: Final = 60.0


@dataclass(frozen=True)
class SpeedRecord:
    """One speed of one set of weights on one machine. Comparable when all but the value's own fields agree."""

    metric: str
    """A key of :data:`bessemer.evaluation.names.SPEEDS`."""
    value: float
    """Median over the rounds."""
    standard_error: float | None
    """Half the distance of the quartiles over the root of the rounds: how well the median is known."""
    higher_is_better: bool
    """Images per second are better the more they are, milliseconds the fewer."""
    estimator: str
    """Size of the batches."""
    samples: int
    """Images that were drawn and timed."""
    seed: int
    """Seed of the latents."""
    truncation: float | None
    """Truncation of the latents; ``None`` for none."""
    weights: str
    """Which weights were sampled, by the profile of the moving average."""
    weights_sha256: str
    """Hash of the snapshot's weights."""
    hardware: str
    """Processor, threads, and version of torch."""
    seconds: float
    """Wall time of the measurement."""

    def as_dict(self) -> dict[str, Any]:
        """The record as the journal keeps it."""
        return asdict(self)


def measure_speed(
    system: System,
    info: Any,
    metrics: Sequence[str],
    *,
    batch_size: int,
    seed: int = 0,
    truncation: float | None = None,
    device: torch.device | str = "cpu",
) -> list[SpeedRecord]:
    """Time the drawing of images, 8-bit rounding included and copying from the device not.

    Batches of the data's classes are drawn over and over, after two that do not count. The median of 20 is taken, or of
    as many, but at least 3, as fit into a minute.

    Args:
        system: with the weights to sample on `device`.
        info: origin of the weights, a :class:`bessemer.systems.snapshot.SnapshotInfo`.
        metrics: keys of :data:`bessemer.evaluation.names.SPEEDS`.
        batch_size: images per batch, for the throughput; a latency is that of one.
        seed: of the latents.
        truncation: of the latents.
        device: of the system.

    Returns:
        One record per metric.
    """
    device = torch.device(device)
    records = []
    for metric in metrics:
        began = time.perf_counter()
        size = 1 if metric == "latency_ms" else batch_size
        prepare(system, info.class_counts, seed=seed, truncation=truncation, device=device)
        labels = torch.from_numpy(allocate_labels(info.class_counts, size)).to(device)
        batch, draws = blank_inputs(system, labels), generator(device, seed, "speed")

        def draw(batch: Batch = batch, draws: torch.Generator = draws) -> None:
            to_stored(system.sample_field, system.sample_for(batch, draws, truncation))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        with torch.no_grad(), sampling_mode(system):
            rounds = _rounds(draw)
        values = [1000 * s if metric == "latency_ms" else size / s for s in rounds]
        low, _, high = statistics.quantiles(values, n=4)
        records.append(
            SpeedRecord(
                metric=metric,
                value=statistics.median(values),
                standard_error=(high - low) / 2 / len(values) ** 0.5,
                higher_is_better=SPEEDS[metric].higher_is_better,
                estimator=f"median of batches of {size}",
                samples=size * len(values),
                seed=seed,
                truncation=truncation,
                weights=weights_name(info.ema),
                weights_sha256=info.weights_sha256,
                hardware=hardware_name(device),
                seconds=time.perf_counter() - began,
            )
        )
    return records


def hardware_name(device: torch.device) -> str:
    """Processor, threads where it is the CPU, and version of torch: what a speed depends on besides the weights."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def _rounds(draw: Callable[[], None]) -> list[float]:
    """Seconds of each round that counts."""
    found: list[float] = []
    begin = time.perf_counter()
    for number in range(_WARM_UP + _ROUNDS):
        start = time.perf_counter()
        draw()
        end = time.perf_counter()
        if number >= _WARM_UP:
            found.append(end - start)
        if len(found) >= _LEAST and end - begin > _SECONDS:
            break
    return found
