"""What Ray costs a run, and how soon a run is going (again): beside torchrun, after a submission, after losses.

BigGAN's `tiny32` preset on digits, workers of one thread. Goals: a step of `bessemer train` takes at most 1.02 of that
of the same trainer under torchrun, measured in turns of a few steps each, in about six minutes; after a killed worker
the first resumed step ends within 15 s; a run that loses a host goes on with fewer workers within 25 s. From a
submission to the end of the first step there is no goal, but a number. Hosts are network namespaces (`cluster/netns`)
and need root; the runs there have had the time to make their spare processes, as long runs have. On one machine alone,
`killed_worker_alone_s`, there are none. --quick is the first goal.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import Ratio, alternate, finish, parse_options, ratio, spread
from _turns import Block, Training

from bessemer.data.packing.pack import pack
from bessemer.tracking.journal import Record, read_journal

ROOT = Path(__file__).resolve().parent.parent
NETNS = ROOT / "cluster" / "netns" / "hosts"
SPACE = f"bench{os.getpid() % 1000}"
WARM_UP = 6
SPARES_SECONDS = 20.0
"""In which spare processes import torch and DeepSpeed, on three hosts that share two cores."""
JOB = """
name: cluster
system: {{name: biggan, preset: tiny32}}
data: {{path: {data}}}
training: {{total_kimg: {kimg}, batch_size: {batch}, slice_size: {slice}, log_every_kimg: {step}, zero_stage: 1}}
checkpoint: {{every_kimg: {every}}}
evaluation: {{metrics: [], every_kimg: 1000, grid: 2}}
tracking: {{mlflow: false}}
resources: {{workers: {workers}, min_workers: {least}, placement: spread}}
"""


def write_job(
    directory: Path,
    kimg: float,
    *,
    workers: int = 2,
    least: int = 2,
    batch: int = 32,
    slice_size: int = 16,
    every: float | None = None,
) -> Path:
    """A job that logs every step and writes a checkpoint every tenth, or every so many thousand images."""
    path, step = directory / f"job-{kimg:g}-{workers}.yaml", batch / 1000
    sizes = {"batch": batch, "slice": slice_size, "step": step, "every": every or 10 * step}
    path.write_text(JOB.format(data=directory / "digits", kimg=kimg, workers=workers, least=least, **sizes))
    return path


def process(command: list[str], **more: str) -> subprocess.Popen[str]:
    """A command of this installation, in the background."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def bessemer(*words: object, **more: str) -> subprocess.Popen[str]:
    """Our command line."""
    return process([sys.executable, "-m", "bessemer.cli", *map(str, words)], **more)


def ended(running: subprocess.Popen[str], seconds: float = 300) -> str:
    """What a process printed, after it has ended well."""
    output, _ = running.communicate(timeout=seconds)
    if running.returncode:
        raise RuntimeError(output)
    return output


def steps(run: Path) -> list[Record]:
    """A record per step, as the journal has them, superseded ones left out."""
    return [record for record in read_journal(run / "journal.jsonl") if record["kind"] == "metrics"]


def await_that(check: Callable[[], bool], running: subprocess.Popen[str] | None = None, seconds: float = 240) -> None:
    """Wait until `check` holds."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end or (running is not None and running.poll() is not None):
            raise RuntimeError(running.communicate()[0] if running is not None else f"waited {seconds} s in vain")
        time.sleep(0.05)


def overhead(directory: Path, rounds: int, steps: int) -> dict[str, list[Block]]:
    """The same training under Ray and under torchrun, both alive all the time, in turns of a few steps.

    While one trains, all processes of the other are frozen, Ray's own too. So both meet the same machine, whatever else
    it does, and a round takes seconds.
    """
    job = write_job(directory, 1000, every=1000)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    blocks: dict[str, list[Block]] = {"ray": [], "torchrun": []}

    def training(name: str, *command: object) -> Training:
        run = directory / f"overhead-{name}"
        words = [sys.executable, "-m", *map(str, command), str(job), "--run-dir", str(run)]
        return Training(words, run, directory / f"{name}.log", env)

    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "bessemer.orchestration.worker")
    with contextlib.ExitStack() as until_the_end:
        sides = {}
        for name, command in (("ray", ("bessemer.cli", "train")), ("torchrun", torchrun)):
            sides[name] = until_the_end.enter_context(contextlib.closing(training(name, *command)))
            sides[name].warm_up(WARM_UP)

        def turn(name: str) -> Callable[[], float]:
            def take() -> float:
                blocks[name].append(sides[name].block(steps))
                return statistics.median(blocks[name][-1].steps)

            return take

        alternate({name: turn(name) for name in sides}, rounds, warm_up=0)
    return blocks


def resumed_after(run: Path, moment: float, already: int) -> Callable[[], bool]:
    """Whether a step has ended after the run went on once more."""

    def check() -> bool:
        resumed = [r["time"] for r in read_journal(run / "journal.jsonl") if r.get("event") == "resumed"][already:]
        return bool(resumed) and steps(run)[-1]["time"] > max(resumed[0], moment)

    return check


def checkpoints(run: Path) -> list[Path]:
    """What could be resumed from."""
    return sorted(run.glob("checkpoints/kimg-*/manifest.json"))


def killed_worker(directory: Path, number: int) -> float:
    """Seconds from kill -9 of a worker to the end of the first resumed step."""
    run = directory / f"killed-{number}"
    running = bessemer("train", write_job(directory, 100), "--run-dir", run)
    try:
        await_that(lambda: bool(checkpoints(run)), running)
        pid = int(re.findall(r"worker 1 of 2, process (\d+)", (run / "logs" / "worker-1.log").read_text())[-1])
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        await_that(resumed_after(run, killed, 0), running)
        return float(steps(run)[-1]["time"] - killed)
    finally:
        running.send_signal(signal.SIGTERM)  # a checkpoint, then the end
        running.communicate(timeout=120)


@contextlib.contextmanager
def network_hosts() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A head and two workers in network namespaces; yields how to call the script."""
    name = {"BESSEMER_NETNS": SPACE}

    def script(*words: object) -> subprocess.Popen[str]:
        return process([sys.executable, str(NETNS), *map(str, words)], **name)

    try:
        ended(script("up"))
        yield script
    finally:
        ended(script("down"))


def training_process(host: str) -> int:
    """The process that trains on a host: the oldest of its workers, since spare ones come later."""
    space = f"{SPACE}-{host}"
    pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True).stdout.split()
    found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    return min(int(pid) for pid, title in found.items() if title.startswith(b"ray::TrainWorker"))


def on_hosts(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from a submission to the end of its first step, and from losses to the end of the first step after."""
    seconds: dict[str, list[float]] = {"submit_to_first_step": [], "killed_worker": [], "lost_host": []}
    with network_hosts() as script:
        env = dict(re.findall(r"(\w+)=(\S+)", ended(script("env"))))
        job = write_job(directory, 100, workers=3, least=2, batch=48, slice_size=8)
        for number in range(rounds):
            if number:
                ended(script("start", "worker-2"))
            sent = time.time()
            run = directory / ended(bessemer("submit", job, "--runs", directory, **env)).splitlines()[1]
            await_that(lambda run=run: bool(run.exists() and steps(run)))  # type: ignore[misc]
            seconds["submit_to_first_step"].append(steps(run)[0]["time"] - sent)
            for already, (name, strike) in enumerate(
                {
                    "killed_worker": lambda: os.kill(training_process("worker-1"), signal.SIGKILL),
                    "lost_host": lambda: ended(script("kill", "worker-2")),
                }.items()
            ):
                saved = checkpoints(run)[-1:]  # old ones are deleted
                await_that(lambda run=run, saved=saved: checkpoints(run)[-1:] > saved)  # type: ignore[misc]
                time.sleep(SPARES_SECONDS)
                struck = time.time()
                strike()
                await_that(resumed_after(run, struck, already))
                seconds[name].append(steps(run)[-1]["time"] - struck)
            ended(bessemer("stop", run.name, **env))
    return seconds


def main() -> int:
    """Measure, print, and return the exit code."""
    options = parse_options(
        __doc__, parts=("overhead", "alone", "hosts"), rounds="turns of each side (40), of 8 steps each"
    )
    parts = ("overhead",) if options.quick else options.parts
    seconds: dict[str, list[float]] = {}
    raw: dict[str, Any] = {"seconds": seconds}
    found: list[Ratio] = []

    def add(name: str, values: list[float], goal: float | None) -> None:
        seconds[name] = values
        found.append(Ratio(f"{name}_s", statistics.median(values), goal, spread(values), len(values)))

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        directory = Path(place)
        pack("digits", directory / "digits", size=32, mode="RGB", limit=20)
        load = os.getloadavg()
        if "overhead" in parts:
            began = time.monotonic()
            blocks = overhead(directory, options.rounds or (3 if options.quick else 40), 2 if options.quick else 6)
            raw["blocks"] = {name: [asdict(block) for block in side] for name, side in blocks.items()}
            raw["overhead_wall_s"] = round(time.monotonic() - began, 1)
            steps_, all_cpu, workers_cpu = (
                {name: [of(block) for block in side] for name, side in blocks.items()}
                for of in (
                    lambda block: statistics.median(block.steps),
                    lambda block: block.workers_cpu + block.others_cpu,
                    lambda block: block.workers_cpu,
                )
            )
            found.append(ratio("step_to_torchrun", steps_["ray"], steps_["torchrun"], goal=1.02, sure=True))
            found.append(ratio("cpu_to_torchrun", all_cpu["ray"], all_cpu["torchrun"], sure=True))
            found.append(ratio("cpu_of_workers_to_torchrun", workers_cpu["ray"], workers_cpu["torchrun"], sure=True))
        if "alone" in parts:
            add("killed_worker_alone", [killed_worker(directory, number) for number in range(2)], None)
        if "hosts" in parts and os.geteuid() == 0:
            goals = {"submit_to_first_step": None, "killed_worker": 15.0, "lost_host": 25.0}
            for name, values in on_hosts(directory, 1).items():
                add(name, values, goals[name])
        return finish(found, {**raw, "load_before": load, "load_after": os.getloadavg()}, options)


if __name__ == "__main__":
    sys.exit(main())
