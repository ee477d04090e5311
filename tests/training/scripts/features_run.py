"""A worker that trains a tiny autoencoder once per setting and stage; one process per rank.

usage: features_run.py OUT

Four slices in all, whatever the number of workers. Writes `<setting>/<stage>/<network>.<key>` -> final weights, and of
the engine `<setting>/<stage>/skipped` and `.../scale`, of the journal `.../journal/<name>`.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import matrix_run
import torch
from matrix_run import SLICE, FixedStream, final_state, make_job, make_trainer, real_slice
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from bessemer.nn.norm import AffineBatchNorm
from bessemer.systems.contract import Batch, Loss, Update
from bessemer.training.distributed import end_process, init_deepspeed, join_workers
from bessemer.training.ema import ShardedEma
from bessemer.training.fragments import gather_full
from bessemer.training.loop import Trainer, owned_slices

SLICES, BATCH = 4, 4 * SLICE
ADAM = {"name": "adam", **matrix_run.OPTIMIZERS["adam"]}
JOURNALLED = ("grad_norm", "lr", "loss_scale", "skipped_steps")
SETTINGS: dict[str, dict[str, Any]] = {
    "lamb": {
        "optimizers": {"vae": {"name": "lamb", "lr": 0.02, "betas": [0.5, 0.9], "eps": 1e-4, "weight_decay": 0.1}}
    },
    "lars": {"optimizers": {"vae": {"name": "lars", "lr": 2.0, "momentum": 0.9, "trust": 0.02, "weight_decay": 0.01}}},
    "schedule": {
        "lr_schedule": {"warmup_kimg": 1.5 * BATCH / 1000, "decay": "cosine", "final": 0.1},
        "lr_scaling": "sqrt",
        "lr_reference_batch": BATCH // 4,
    },
    "nan at 0": {},
    "nan at 2": {},
    "nan at 2, sanitized": {"sanitize_gradients": True},
    "clip": {"gradient_clipping": 0.5},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "plain": {},
    "offload": {"offload": "optimizer"},
    "nan at 2, offload": {"offload": "optimizer"},
    "lamb, offload": {},
    "channels last": {"channels_last": True},
    "shared statistics": {"batch_statistics": "workers"},
    "compile": {"compile": ["generator", "discriminator"]},
}


class NormNet(nn.Module):
    """A network with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, 16, bias=False), AffineBatchNorm(16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x).view(-1, 16, 1, 1)).flatten(1)))


class NormMethod(matrix_run.Method):
    """Reconstruction and a penalty on the slope: second derivatives through the normalisation."""

    def __init__(self, config: Any, method: str) -> None:
        super().__init__(config, "vae")
        self._networks = {"vae": NormNet()}

    def updates(self, clock: Any) -> list[Update]:
        return [Update("vae", "vae", self.loss, second_order=True)]

    def loss(self, batch: Batch, draws: Generator) -> Loss:
        x = batch.images.flatten(1).requires_grad_()
        y = self._networks["vae"](x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return Loss((y - x).square().mean() + 0.01 * slope.square().mean())


SETTINGS["lamb, offload"] = {**SETTINGS["lamb"], "offload": "optimizer"}
SETTINGS |= {f"{name}, resumed": SETTINGS[name] for name in ("lamb", "lars", "schedule", "fp16", "offload")}


def poisoned(nimg: int, index: int) -> Batch:
    """A batch at `nimg` that lets slice 1 have a gradient that is not finite."""
    batch = real_slice(nimg, index)
    return Batch(batch.images, torch.ones_like(batch.labels)) if index == 1 else batch


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Whole weights and moments from the fragments of all workers."""
    engine = trainer.engines["vae"]
    kinds = {"weight": engine.fragments(), **engine.state_fragments()}
    whole = {kind: gather_full(f, engine.shapes, trainer.workers) for kind, f in kinds.items()}
    return {f"{kind}.{k}": v for kind, tensors in whole.items() for k, v in tensors.items()}


def check_other_stages(trainer: Trainer, root: Path) -> None:
    """A checkpoint restores at every stage to the same weights and moments, and trains on alike."""
    trainer._save()
    trainer.checkpoints.finish()
    saved = everything(trainer)
    assert {"weight.encoder.0.weight", "exp_avg.encoder.0.weight", "exp_avg_sq.decoder.2.bias"} <= saved.keys()
    for stage, offload in [(0, "none"), *product((1, 2, 3), ("none", "optimizer"))]:
        fields = trainer.job.training.model_dump() | {"zero_stage": stage, "offload": offload}
        job = trainer.job.model_copy(update={"training": type(trainer.job.training)(**fields)})
        other = make_trainer(job, "vae", trainer.workers, root)
        assert other.resume()
        restored = everything(other)
        assert saved.keys() == restored.keys()
        assert all(torch.equal(v, restored[k]) for k, v in saved.items()), (stage, offload)
        average = ShardedEma(other.engines["vae"], job.ema, trainer.workers).full_state()
        assert all(torch.equal(v, saved[f"weight.{k}"]) for k, v in average.items()), (stage, offload)
        other._iteration()
        after = everything(other)
        if stage == 0:
            wanted = after
        for k, v in wanted.items():
            torch.testing.assert_close(after[k], v, rtol=0, atol=1e-5 if "exp_avg" in k else 1e-6)


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    results: dict[str, Tensor] = {}
    with join_workers() as workers:
        init_deepspeed(workers.device)
        own = owned_slices(SLICES, workers.rank, workers.size)
        for setting, fields in SETTINGS.items():
            for stage in (0, 1, 2, 3):
                if stage == 0 and "offload" in setting:
                    continue  # ZeRO does it
                if stage == 3 and setting == "shared statistics":
                    continue  # its loss is of second order
                if setting == "compile" and (stage, workers.size) != (1, 1):
                    continue  # compiling takes half a minute
                method = "hinge" if setting == "compile" else "vae"
                adam = dict.fromkeys(matrix_run.make_networks(method), ADAM)
                job = make_job(method, stage, SLICES, workers.size, **{"optimizers": adam, **fields})
                bad = int(setting[7]) * BATCH if setting.startswith("nan at") else -1
                stream = FixedStream(own, lambda n, i, bad=bad: (poisoned if n == bad else real_slice)(n, i))
                system = NormMethod if setting == "shared statistics" else matrix_run.Method
                root = out.parent / f"{setting}{stage}"
                trainer = make_trainer(job, method, workers, root, stream, system)
                assert trainer.engines[next(iter(adam))]._engine.zero_cpu_offload() == ("offload" in setting)
                iterations = 20 if setting.startswith("fp16") else matrix_run.ITERATIONS
                if setting.endswith(", resumed"):
                    for _ in range(iterations // 2):
                        trainer._iteration()
                    trainer._save()
                    trainer.checkpoints.finish()
                    trainer = make_trainer(job, method, workers, root, stream, system)
                    assert trainer.resume()
                    iterations -= iterations // 2
                for _ in range(iterations):
                    trainer._iteration()
                if setting == "plain":
                    check_other_stages(trainer, root)
                if setting == "channels last":
                    images = trainer._on_device(real_slice(0, 0), 0).images
                    assert images.is_contiguous(memory_format=torch.channels_last)
                    assert not images.is_contiguous()
                results |= {f"{setting}/{stage}/{k}": v for k, v in final_state(trainer).items()}
                if setting == "compile":
                    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                    results["compile/1/graphs"] = torch.tensor(float(graphs))
                    continue
                if setting in ("schedule", "fp16"):  # the others' losses may be NaN, which ends a run
                    lines: list[dict[str, float]] = []
                    trainer.write = lambda kind, nimg, values, lines=lines: lines.append(values)
                    trainer._log()
                    named = {k: v for k, v in lines[0].items() if k.partition("/")[0] in JOURNALLED}
                    results |= {f"{setting}/{stage}/journal/{k}": torch.tensor(v) for k, v in named.items()}
                gradients = trainer.engines["vae"].gradients
                results[f"{setting}/{stage}/skipped"] = torch.tensor(float(gradients.skipped))
                if gradients.scale is not None:
                    results[f"{setting}/{stage}/scale"] = torch.tensor(gradients.scale.value)
        save_file(results, out.with_suffix(f".{workers.rank}.safetensors"))


if __name__ == "__main__":
    main()
    end_process(0)
