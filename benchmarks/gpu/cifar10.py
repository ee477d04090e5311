"""A flagship trained on the real images of CIFAR-10 for as long as asked: its curve of KID and FD, and its last grid.

``python benchmarks/gpu/cifar10.py --minutes 20 --job jobs/stylegan2-cifar10.yaml --out results/DATE-cifar10.json``. The
environment's BESSEMER_CIFAR10 names the images, as a folder or an archive of class/name.jpg. The worker runs under
torchrun, without Ray and MLflow; the grid is written beside the JSON. `--set FIELD=VALUE` overrides fields of the job.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _gpu import gpu_options

from _common import Ratio, finish  # isort: skip  # _gpu says where it is
from bessemer.data.packing.pack import pack
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.load import load_job
from bessemer.tracking.journal import read_journal

ROOT = Path(__file__).resolve().parent.parent.parent


def train(job: Path, run: Path, changes: list[str], workers: int, seconds: float) -> bool:
    """Train until the job's end, or for so long and then to a checkpoint; whether either was reached."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command = [*torchrun, "-m", "bessemer.orchestration.worker", str(job), "--run-dir", str(run)]
    process = subprocess.Popen([*command, *(word for change in changes for word in ("--set", change))])
    until = time.monotonic() + seconds
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() > until and (run / "run.json").is_file() and curve(run):
            RunDirectory.open(run).request_stop()
    # torchrun turns the worker's 75, stopped and ready to be resumed, into a failure.
    return process.returncode == 0 or any(r.get("event") == "preempted" for r in read_journal(run / "journal.jsonl"))


def curve(run: Path) -> dict[str, Any]:
    """Metric -> images and values; and the speed of each line of metrics."""
    records = read_journal(run / "journal.jsonl")
    found: dict[str, Any] = {}
    for record in records:
        if record["kind"] == "evaluation":
            found.setdefault(record["metric"], []).append([record["nimg"], record["value"]])
        if record["kind"] == "metrics":
            found.setdefault("img_per_s", []).append([record["nimg"], record["values"]["throughput/img_per_s"]])
    return found


def main() -> int:
    """Pack, train, and tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to train")
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "stylegan2-cifar10.yaml", help="job file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the job")
    options = gpu_options(__doc__, parser)
    own, unknown = parser.parse_known_args()
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    source = os.environ.get("BESSEMER_CIFAR10")
    if source is None and options.device.type == "cuda":
        print(
            "cifar10.py: set BESSEMER_CIFAR10 to the images, a folder or an archive of class/name.jpg.", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory(dir=".") as directory:
        root, run = Path(directory), Path(directory) / "run"
        pack(source or "digits", root / "data", size=32, mode="RGB", limit=None if source else 40)
        gpus = int(options.device.type == "cuda")
        changes = [f"data.path={root.resolve() / 'data'}", "resources.workers=1", f"resources.gpus_per_worker={gpus}"]
        job = load_job(own.job, [*changes, *own.set])
        done = train(own.job, run, [*changes, *own.set], 1, 60 * own.minutes)
        found = curve(run) if done else {}
        grids = sorted((run / "samples").glob("*.png"))
        if options.out is not None and grids:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(grids[-1], options.out.with_suffix(".png"))
        if not found:
            print("cifar10.py: the worker failed; see above.", file=sys.stderr)
            return 1
        ratios = [
            Ratio(f"{name}_last_to_first", values[-1][1] / values[0][1], 1.0)
            for name, values in found.items()
            if name in job.evaluation.metrics and len(values) > 1
        ]
        return finish(ratios, {"job": job.model_dump(mode="json"), "curve": found}, options)


if __name__ == "__main__":
    sys.exit(main())
