"""A worker of a tiny adversarial run in which something goes wrong; the tests start one process per rank.

usage: guarded_run.py OUT ZERO_STAGE ITERATIONS --run DIR [--job JSON] [--poison loss|gradient --from NIMG --to NIMG]
       [--without UPDATE] [--bounded] [--far] [--flip NETWORK.TENSOR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_run import SLICE, FixedStream, TinyGan, make_job, make_trainer
from torch import Generator, Tensor, nn

from bessemer.errors import TrainingError
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Batch, Clock, Loss, SystemConfig, Update
from bessemer.training.distributed import end_process, init_deepspeed, join_workers
from bessemer.training.loop import Trainer

MARK = 1e20


class PoisonedGan(TinyGan):
    """Its discriminator's loss goes wrong where an image bears a mark, and its scores have no bound."""

    poison: str | None = None
    without: str | None = None

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config)
        self.discriminator = nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 1))

    def updates(self, clock: Clock) -> list[Update]:
        return [update for update in super().updates(clock) if update.name != self.without]

    def d_loss(self, batch: Batch, draws: Generator) -> Loss:
        marked = bool(batch.images.max() >= MARK)
        loss = super().d_loss(Batch(batch.images.clamp(-10, 10), batch.labels), draws)
        with torch.no_grad():
            fake = self.generator(torch.randn(len(batch.images), 5, generator=draws))
            real = self.discriminator(batch.images.clamp(-10, 10).flatten(1)).mean()
            scores = {"scores/real": real, "scores/fake": self.discriminator(fake).mean()}
        value = loss.value
        if marked and self.poison == "loss":
            value = value * float("nan")
        if marked and self.poison == "gradient":  # the root of zero: its value is finite, its gradient is not
            value = value + (0 * self.discriminator[0].weight.sum()).sqrt()
        return Loss(value, scores)

    def r1_loss(self, batch: Batch, draws: Generator) -> Loss:
        return super().r1_loss(Batch(batch.images.clamp(-10, 10), batch.labels), draws)


class BoundedGan(PoisonedGan):
    """Its generator has nothing that keeps samples apart: too large steps drive all of them into one corner."""

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config)
        self.generator = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh())


class MarkedStream(FixedStream):
    """Marks the last slice of the batches between two moments; `far` images are easily told from generated ones."""

    def __init__(self, slices: list[int], last: int, begin: int, end: int, far: bool) -> None:
        super().__init__(slices)
        self.last, self.begin, self.end, self.far = last, begin, end, far

    def batch(self, nimg: int) -> list[Batch]:
        batches = [Batch(0.3 * b.images + 2, b.labels) if self.far else b for b in super().batch(nimg)]
        if not self.begin <= nimg < self.end:
            return batches
        return [self._mark(index, batch) for index, batch in zip(self.slices, batches, strict=True)]

    def _mark(self, index: int, batch: Batch) -> Batch:
        images = batch.images.clone()
        if index == self.last:
            images[0, 0, 0, 0] = MARK
        return Batch(images, batch.labels)


def flip_at(trainer: Trainer, nimg: int, network: str, tensor: str) -> None:
    """Flip a bit of the last element of a tensor when the batch at `nimg` is read, as a bad memory would."""
    read = trainer.stream.batch

    def batch(at: int) -> list[Batch]:
        if at == nimg and trainer.stream.batch is batch:
            trainer.stream.batch = read  # once: several updates read the same batch
            bits = trainer.system.networks()[network].state_dict()[tensor].view(-1).view(torch.int32)
            bits[-1] ^= 1 << 20
        return read(at)

    trainer.stream.batch = batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", type=int)
    parser.add_argument("iterations", type=int)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--poison", choices=["loss", "gradient"])
    parser.add_argument("--from", dest="begin", type=int, default=0)
    parser.add_argument("--to", dest="end", type=int, default=0)
    parser.add_argument("--without")
    parser.add_argument("--bounded", action="store_true")
    parser.add_argument("--flip", metavar="NETWORK.TENSOR", help="flip one bit on the last worker, before image FROM")
    parser.add_argument("--far", action="store_true")
    parser.add_argument("--job", type=json.loads, default={})
    options = parser.parse_args()
    torch.set_num_threads(1)
    with join_workers() as workers:
        init_deepspeed(workers.device)
        fields: dict[str, Any] = make_job(options.stage, options.iterations, workers.size).model_dump()
        for section, own in options.job.items():
            fields[section] = {**fields[section], **own}
        kind = BoundedGan if options.bounded else PoisonedGan
        trainer = make_trainer(JobSpec.model_validate(fields), options.run, workers, kind)
        assert isinstance(trainer.system, PoisonedGan)
        trainer.system.poison, trainer.system.without = options.poison, options.without
        last = trainer.job.training.batch_size // SLICE - 1
        trainer.stream = MarkedStream(trainer.slices, last, options.begin, options.end, options.far)
        if options.flip is not None and workers.rank == workers.size - 1:
            flip_at(trainer, options.begin, *options.flip.split(".", 1))
        state: dict[str, Tensor] = {}
        try:
            trainer.resume()
            trainer.run()
        except TrainingError as e:
            trainer.write("event", trainer.clock.nimg, event="failed", error=str(e))
        for name, network in trainer.system.networks().items():
            state |= {f"{name}.{k}": v.detach().clone() for k, v in network.state_dict().items()}
        save_file(state, options.out.with_suffix(f".{workers.rank}.safetensors"))


if __name__ == "__main__":
    main()
    end_process(0)
