"""What a step costs beside plain loops of the same system, what resuming costs, and how long a step waits for data.

Two workers, one thread each, train BigGAN's smallest preset on handwritten digits. All sides live in the same
processes and take turns: the Trainer with its engines, stream, averages and metrics, at ZeRO 0, 1 and 2; the loop that
most people write, with torch's DistributedDataParallel, Adam and one average; and the same with flat gradients and one
all-reduce per update instead, which nobody writes and which shows what is left to win.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from _common import Ratio, alternate, finish, in_workers, is_worker, parse_options, ratio, spread, worker_result
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.stream import SliceStream
from bessemer.nn.update_state import begin_update, end_update
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, System, Update
from bessemer.systems.registry import build
from bessemer.training.checkpoint import CheckpointStore, Identity
from bessemer.training.distributed import Workers, end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma, ema_beta
from bessemer.training.engine import build_engines
from bessemer.training.loop import Trainer, owned_slices
from bessemer.training.rng import generator

WORKERS = 2
STEP_GOAL = 1.03
DATA_GOAL = 0.02


def make_job(data: Path, stage: int) -> JobSpec:
    """The quickstart's sizes."""
    return JobSpec.model_validate(
        {
            "name": "core",
            "system": {"name": "biggan", "preset": "tiny32"},
            "data": {"path": str(data)},
            "training": {"total_kimg": 1000, "batch_size": 32, "slice_size": 16, "zero_stage": stage},
            "resources": {"workers": WORKERS},
        }
    )


def make_system(job: JobSpec, dataset: ShardedDataset) -> System:
    """BigGAN with its first weights, in training mode."""
    system = build("biggan", job.system.preset, {}, dataset.manifest.facts)
    system.init_weights(generator("cpu", job.seed, "init"))
    for network in system.networks().values():
        network.train()
    return system


def make_stream(job: JobSpec, dataset: ShardedDataset, workers: Workers) -> SliceStream:
    """This worker's slices; each side has its own stream, so that neither reads ahead for the other."""
    return SliceStream(
        dataset,
        seed=job.seed,
        batch_size=job.training.batch_size,
        slice_size=job.training.slice_size,
        slices=owned_slices(job.slices, workers.rank, workers.size),
        threads=job.data.threads,
    )


@torch.no_grad()
def distance(a: System, b: System) -> float:
    """Norm of the difference of all weights over the norm of a's. Adam makes whole steps of what is rounding noise."""
    ours, theirs = (
        torch.cat([p.view(-1) for network in system.networks().values() for p in network.parameters()])
        for system in (a, b)
    )
    return float((ours - theirs).norm() / ours.norm())


class FlatLoop:
    """The same iteration with torch alone: gradients of one update are summed in one flat tensor."""

    def __init__(self, job: JobSpec, dataset: ShardedDataset, workers: Workers) -> None:
        self.job, self.workers, self.system = job, workers, make_system(job, dataset)
        self.stream = make_stream(job, dataset, workers)
        self.slices = owned_slices(job.slices, workers.rank, workers.size)
        self.networks = self.system.networks()
        self.optimizers = {
            name: torch.optim.Adam(self.networks[name].parameters(), lr=o.lr, betas=o.betas, eps=o.eps)
            for name, o in self.system.optimizers().items()
        }
        self.live = [p for name in self.system.sampled_networks for p in self.networks[name].parameters()]
        self.average = [p.detach().clone() for p in self.live]
        self.nimg = 0

    def iteration(self) -> None:
        images = self.job.training.batch_size
        for update in self.system.updates(Clock(self.nimg, 0)):
            begin_update(self.networks.values())
            for name, network in self.networks.items():
                network.requires_grad_(name == update.network)
            self.differentiate(update, self.stream.batch(self.nimg))
            end_update(self.networks.values(), self.workers.sum)
            self.optimizers[update.network].step()
            self.optimizers[update.network].zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.live, 1 - ema_beta(self.job.ema, images, self.nimg))
        self.nimg += images

    def differentiate(self, update: Update, batches: list[Batch]) -> None:
        """Gradients of this worker's slices, averaged over the workers."""
        for index, batch in zip(self.slices, batches, strict=True):
            self.loss(update, batch, index).backward()
        trained = list(self.networks[update.network].parameters())
        flat = torch.cat([p.grad.view(-1) for p in trained])
        dist.all_reduce(flat)
        flat /= self.workers.size
        for p, grad in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = grad.view_as(p)

    def loss(self, update: Update, batch: Batch, index: int) -> Tensor:
        draws = generator("cpu", self.job.seed, update.name, self.nimg, index)
        return update.loss(batch, draws).value / len(self.slices)

    def save(self, path: Path) -> None:
        torch.save(self._state(), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, network in self.networks.items():
            network.load_state_dict(state[name])
            self.optimizers[name].load_state_dict(state[f"{name}.optimizer"])
        torch._foreach_copy_(self.average, state["average"])

    def _state(self) -> dict[str, object]:
        state: dict[str, object] = {name: network.state_dict() for name, network in self.networks.items()}
        state |= {f"{name}.optimizer": o.state_dict() for name, o in self.optimizers.items()}
        return {**state, "average": self.average}


class Wrapped(DistributedDataParallel):
    """A network that sums its gradients over the workers, and has the attributes of the network."""

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class DdpLoop(FlatLoop):
    """The same iteration with DistributedDataParallel, which sums while the backward pass still runs."""

    def __init__(self, job: JobSpec, dataset: ShardedDataset, workers: Workers) -> None:
        super().__init__(job, dataset, workers)
        self.wrapped = {
            name: Wrapped(network, broadcast_buffers=False, gradient_as_bucket_view=True)
            for name, network in self.networks.items()
        }

    def differentiate(self, update: Update, batches: list[Batch]) -> None:
        wrapped = self.wrapped[update.network]
        setattr(self.system, update.network, wrapped)  # the network that is trained; others are frozen
        for index, batch in zip(self.slices, batches, strict=True):
            last = index == self.slices[-1]
            with nullcontext() if last else wrapped.no_sync():
                self.loss(update, batch, index).backward()
        setattr(self.system, update.network, wrapped.module)


def make_trainer(job: JobSpec, dataset: ShardedDataset, workers: Workers, root: Path) -> Trainer:
    """Our side, with checkpoints below `root`."""
    system = make_system(job, dataset)
    engines = build_engines(system.networks(), system.optimizers(), job.training, workers, system.updates(Clock(0, 0)))
    emas = {name: ShardedEma(engines[name], job.ema, workers) for name in system.sampled_networks}
    identity = Identity("biggan", {}, job.seed, job.training.batch_size, job.training.slice_size, "digits")
    return Trainer(
        job,
        system,
        engines,
        emas,
        make_stream(job, dataset, workers),
        CheckpointStore(root, job.checkpoint, workers),
        identity,
        workers,
        lambda *fields, **more: None,
        lambda clock, state: None,
    )


def work(data: Path, root: Path, stage: int, rounds: int) -> None:
    """One worker at one stage: hands over seconds per iteration, the breakdown, and seconds per resume."""
    torch.set_num_threads(1)
    with join_workers() as workers, ShardedDataset.open(data) as dataset:
        init_deepspeed(workers.device)
        job = make_job(data, stage)
        trainer = make_trainer(job, dataset, workers, root / f"zero{stage}")
        ddp, flat = DdpLoop(job, dataset, workers), FlatLoop(job, dataset, workers)

        def train() -> None:
            with trainer.meter.collectives():
                trainer._iteration()

        cpu: dict[str, list[float]] = {"trainer": [], "ddp": [], "flat": []}

        def timed(name: str, call: Callable[[], object]) -> Callable[[], float]:
            def side() -> float:
                workers.barrier()
                begun, begun_cpu = time.perf_counter(), time.process_time()
                call()
                cpu.setdefault(name, []).append(time.process_time() - begun_cpu)
                workers.barrier()
                return time.perf_counter() - begun

            return side

        sides = {
            "trainer": timed("trainer", train),
            "ddp": timed("ddp", ddp.iteration),
            "flat": timed("flat", flat.iteration),
        }
        alternate(sides, 2, warm_up=0)
        differ = {name: distance(side.system, trainer.system) for name, side in (("ddp", ddp), ("flat", flat))}
        if max(differ.values()) > 1e-3:
            raise SystemExit(f"the sides train different networks: weights differ by {differ}")
        trainer.meter.take_seconds()
        for seconds in cpu.values():
            seconds.clear()
        steps = alternate(sides, rounds, warm_up=0)
        parts = {name: seconds / rounds for name, seconds in trainer.meter.take_seconds().items()}
        cpu_steps = {name: list(seconds) for name, seconds in cpu.items()}

        trainer._save()
        trainer.checkpoints.finish()
        if workers.is_first:
            flat.save(root / f"plain{stage}.pt")
        workers.barrier()
        resumes = alternate(
            {
                "trainer": timed("resume", trainer.resume),
                "plain": timed("load", lambda: flat.load(root / f"plain{stage}.pt")),
            },
            min(rounds, 10),
        )
        for side in (trainer, ddp, flat):
            side.stream.close()
        worker_result({"step": steps, "cpu": cpu_steps, "parts": parts, "resume": resumes, "differ": differ})


def main() -> int:
    """Run all stages, each in processes of its own."""
    if is_worker():
        parser = argparse.ArgumentParser()
        parser.add_argument("data", type=Path)
        parser.add_argument("root", type=Path)
        for number in ("stage", "rounds"):
            parser.add_argument(number, type=int)
        work(**vars(parser.parse_args()))
        end_process(0)
    options = parse_options(__doc__)
    stages, rounds = ([0], 2) if options.quick else ([0, 1, 2], 30)
    ratios: list[Ratio] = []
    raw: dict[str, object] = {"workers": WORKERS}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        pack("digits", root / "digits", size=32, mode="RGB", limit=20)
        for stage in stages:
            found = in_workers(WORKERS, root / "digits", root, stage, rounds)
            raw[f"zero{stage}"] = found
            step, resume, parts = found["step"], found["resume"], found["parts"]
            whole = sum(step["trainer"]) / rounds
            ratios += [
                ratio(f"step_zero{stage}", step["trainer"], step["ddp"], STEP_GOAL),
                ratio(f"step_to_flat_zero{stage}", step["trainer"], step["flat"]),
                # What other programs on the machine do not disturb; without waiting.
                ratio(f"cpu_time_zero{stage}", found["cpu"]["trainer"], found["cpu"]["ddp"]),
                Ratio(f"data_share_zero{stage}", parts["data"] / whole, DATA_GOAL),
                ratio(f"resume_zero{stage}", resume["trainer"], resume["plain"]),
            ]
            raw[f"spread_zero{stage}"] = {side: spread(seconds) for side, seconds in step.items()}
    return finish(ratios, raw, options)


if __name__ == "__main__":
    sys.exit(main())
