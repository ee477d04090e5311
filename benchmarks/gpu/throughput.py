"""Images per second, memory and FLOP utilisation of the flagships by precision, memory layout and compilation.

StyleGAN2 at 256 pixels (paper256), BigGAN at 128 and NVAE on CIFAR-10, each with all its updates, averages and
optimizers, on noise that lies on the device. `fp32` is without TF32. A ratio is seconds over those of `tf32`: less is
better.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from _gpu import Bench, Flagship, GpuOptions, Timer, flagships, gpu_options, out_of_memory

from _common import Ratio, finish  # isort: skip  # _gpu says where it is
from bessemer.training.costs import slice_costs
from bessemer.training.devices import peak_flops
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "tf32": {},
    "tf32-channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16-channels_last": {"precision": "bf16", "channels_last": True},
    "bf16-channels_last-compiled": {"precision": "bf16", "channels_last": True, "compile": True},
    "fp16-channels_last": {"precision": "fp16", "channels_last": True},
}
"""Name -> fields of `training`; `compile` means all networks that may be."""


def measure(flagship: Flagship, setting: str, workers: Workers, rounds: int) -> dict[str, Any]:
    """Seconds per iteration, images per second, peak memory and utilisation."""
    fields = dict(SETTINGS[setting])
    fields["compile"] = flagship.compiled if fields.pop("compile", False) else ()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = setting != "fp32"
    timer = Timer(workers.device)
    timer.empty()
    bench = Bench(flagship, workers, **fields)
    first = timer.seconds(bench.iteration)  # compiles, and all lazy updates are due
    for _ in range(2):
        bench.iteration()
    while bench.clock.iteration % flagship.cycle:
        bench.iteration()
    images = 0

    def cycle() -> None:
        nonlocal images
        for _ in range(flagship.cycle):
            images += bench.iteration()

    seconds = [timer.seconds(cycle) for _ in range(rounds)]
    speed = images / sum(seconds)
    precision = fields.get("precision", "fp32")
    peak = peak_flops(workers.device, precision) if setting != "fp32" else None
    costs = slice_costs(flagship.build, flagship.slice_size, accumulated=False, half=precision != "fp32")
    per_iteration = sum(c.flops * c.update.repeats / c.update.interval for c in costs) * workers.size
    per_image = per_iteration * rounds * flagship.cycle / images
    return {
        "seconds": [s / flagship.cycle for s in seconds],
        "first_seconds": first,
        "images_per_second": speed,
        "peak_bytes": timer.peak(),
        "flops_per_image": per_image,
        "flop_utilisation": None if peak is None else speed * per_image / (peak * workers.size),
        "skipped_steps": {name: engine.skipped_steps for name, engine in bench.engines.items()},
    }


def _left_out(fields: dict[str, Any], flagship: Flagship, options: GpuOptions) -> bool:
    """What a flagship or the CPU cannot do, or does too slowly for a test."""
    if fields.get("compile"):
        return not flagship.compiled or options.device.type == "cpu"
    return options.device.type == "cpu" and fields.get("precision") == "fp16"


def main() -> int:
    """Measure every flagship in every setting."""
    options = gpu_options(__doc__)
    rounds, ratios, raw = 2 if options.quick else 10, list[Ratio](), dict[str, Any]()
    with join_workers() as workers:
        init_deepspeed(workers.device)
        for name, flagship in flagships(options.device).items():
            raw[name] = {"slice_size": flagship.slice_size, "workers": workers.size}
            for setting, fields in SETTINGS.items():
                if _left_out(fields, flagship, options):
                    continue
                found = out_of_memory(lambda f=flagship, s=setting: measure(f, s, workers, rounds))  # type: ignore[misc]
                raw[name][setting] = found or "the memory did not suffice"
                if found and workers.is_first:
                    used = f"{found['peak_bytes'] / 2**30:.1f} GiB" if found["peak_bytes"] else "-"
                    part = f", {found['flop_utilisation']:.1%} of the peak" if found["flop_utilisation"] else ""
                    print(f"# {name} {setting}: {found['images_per_second']:.4g} img/s, {used}{part}")
            base = raw[name]["tf32"]
            for setting, found in raw[name].items():
                if isinstance(found, dict) and isinstance(base, dict) and setting not in ("tf32", "fp32"):
                    ratios.append(Ratio(f"{name}_{setting}", base["images_per_second"] / found["images_per_second"]))
        return finish(ratios, raw, options) if workers.is_first else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    end_process(main())
