"""What optimizer offload saves of a GPU's memory, and what it costs in time: BigGAN at 128 pixels, ZeRO 1 and 2.

Ratios are of peak memory and of seconds per iteration, with offload over without.
"""

from __future__ import annotations

from typing import Any

from _gpu import Bench, Timer, flagships, gpu_options

from _common import Ratio, finish, ratio  # isort: skip  # _gpu says where it is
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers


def measure(workers: Workers, stage: int, offload: str, rounds: int) -> dict[str, Any]:
    """Seconds per iteration, most memory, and where the optimizer's state lies."""
    timer = Timer(workers.device)
    timer.empty()
    (flagship,) = (f for name, f in flagships(workers.device).items() if name.startswith("biggan"))
    bench = Bench(flagship, workers, zero_stage=stage, offload=offload)
    bench.iteration()
    seconds = [timer.seconds(bench.iteration) for _ in range(rounds)]
    states = [f for engine in bench.engines.values() for fs in engine.state_fragments().values() for f in fs]
    return {
        "seconds": seconds,
        "peak_bytes": timer.peak(),
        "state_on": sorted({f.data.device.type for f in states}),
        "state_bytes": sum(f.data.nbytes for f in states),
    }


def main() -> int:
    """Measure with and without."""
    options = gpu_options(__doc__)
    rounds, ratios, raw = 2 if options.quick else 20, list[Ratio](), dict[str, Any]()
    with join_workers() as workers:
        init_deepspeed(workers.device)
        for stage in (1, 2):
            found = {offload: measure(workers, stage, offload, rounds) for offload in ("none", "optimizer")}
            raw[f"zero{stage}"] = found
            ratios.append(ratio(f"zero{stage}_seconds", found["optimizer"]["seconds"], found["none"]["seconds"]))
            if found["none"]["peak_bytes"]:
                memory = found["optimizer"]["peak_bytes"] / found["none"]["peak_bytes"]
                ratios.append(Ratio(f"zero{stage}_memory", memory, 1.0))
        return finish(ratios, raw, options) if workers.is_first else 0


if __name__ == "__main__":
    end_process(main())
