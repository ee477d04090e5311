"""One DeepSpeed engine per network, and the discipline that keeps several of them right.

What DeepSpeed does silently wrong with several networks, and what is done about it here:

- Forward passes go through the plain module, never through the engine, whose hooks break second derivatives.
- Every slice calls ``engine.backward``; ``managed_gradient_accumulation`` is off, or all but the last slice's
  gradients are dropped at ZeRO 1 and 2.
- Networks that an update does not step are frozen, or their gradients leak into their next step.
- DeepSpeed's clipping (1.0 unless written), norms and overflow checks are off: :mod:`bessemer.training.gradients`
  treats gradients alike at every stage, at the one moment when all stages have them: as the optimizer steps.
- The optimizer is torch's own: DeepSpeed's "Adam" is AdamW with weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from bessemer.spec.job import OptimizerSpec, TrainingSpec
from bessemer.systems.contract import OptimizerDefaults, Update
from bessemer.training.distributed import COLLECTIVE_TIMEOUT, Workers
from bessemer.training.fragments import Fragment
from bessemer.training.gradients import Gradients
from bessemer.training.large_batch import LayerWise, Run
from bessemer.training.optimizers import build_optimizer, lazy_correction

__all__ = ["BUCKET_ELEMENTS", "LIVE_BUCKETS", "NetworkEngine", "build_engines"]

BUCKET_ELEMENTS = 1 << 24  # DeepSpeed's default of 5e8 allocates 2 GB per engine

LIVE_BUCKETS = (
    4  # of weights that ZeRO 3 keeps gathered; DeepSpeed's default of 1e9 elements leaves most networks whole
)


@dataclass(frozen=True)
class _Place:
    """This worker's share of one parameter in a flat fp32 partition."""

    index: int
    name: str
    shape: torch.Size
    flat: Tensor
    at: int
    """First element in the flat partition."""
    start: int
    """First element in the flattened parameter."""
    numel: int

    def fragment(self, flat: Tensor) -> Fragment:
        """The share in `flat`, the partition itself or a state of its shape."""
        return Fragment(self.name, self.shape, self.start, flat.narrow(0, self.at, self.numel))


_STAGE_SETTINGS: dict[int, dict[str, Any]] = {
    1: {"compute_grad_norm": False},
    2: {"compute_grad_norm": False},
    # Nothing stays whole: a restored checkpoint would not reach tensors that DeepSpeed keeps gathered.
    3: {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "overlap_comm": False},
}


def _offload_settings(stage: int, workers: Workers) -> dict[str, Any]:
    """What keeps fp32 weights, gradients and optimizer states of this worker's share in host memory."""
    # DeepSpeed offloads only together with its own norm, which `_guard_step` then takes away.
    norm = {"compute_grad_norm": True} if stage < 3 else {}
    return {**norm, "offload_optimizer": {"device": "cpu", "pin_memory": workers.device.type == "cuda"}}


class NetworkEngine:
    """A network with its optimizer under ZeRO 0, 1, 2 or 3.

    Attributes:
        name: the network's name in the system.
        module: the network itself; every forward pass goes through it.
        gradients: what happens to averaged gradients before a step, and their last norm.
    """

    def __init__(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, training: TrainingSpec, workers: Workers
    ) -> None:
        import deepspeed

        for key, parameter in module.named_parameters():
            assert parameter.dim() > 0, f"{name}.{key}: DeepSpeed fails on 0-dimensional parameters, use shape (1,)"
        self.name = name
        self.module = module
        self._workers = workers
        self._shapes = {key: p.shape for key, p in module.named_parameters()}
        self._discards = False
        self._offloads = training.offload == "optimizer"
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.gradients = Gradients(training, workers, sharded=training.zero_stage > 0)
        elements = sum(p.numel() for p in module.parameters())
        bucket = min(BUCKET_ELEMENTS, elements + elements % 2)  # must be even
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_batch_size": workers.size,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
                "zero_optimization": {
                    "stage": training.zero_stage,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    "stage3_prefetch_bucket_size": bucket,
                    "stage3_max_live_parameters": LIVE_BUCKETS * bucket,
                    **_STAGE_SETTINGS.get(training.zero_stage, {}),
                    **(_offload_settings(training.zero_stage, workers) if self._offloads else {}),
                    "sub_group_size": max(elements, 1),  # one flat partition at stage 3
                },
            },
        )
        for group in (self._engine.data_parallel_group, self._engine.seq_data_parallel_group):
            _set_pg_timeout(COLLECTIVE_TIMEOUT, group)
        self._guard_step()
        if name in training.compile:
            module.compile()
        if isinstance(optimizer, LayerWise) and self.zero_stage > 0:
            optimizer.cut([Run(p.index, p.at, p.numel) for p in self._places() if p.numel], workers.sum)

    def _guard_step(self) -> None:
        """Treat gradients, and perhaps leave the step out, whenever DeepSpeed lets the optimizer step."""
        optimizer = self.torch_optimizer
        step = optimizer.step

        def guarded(closure: Any = None) -> None:
            if not self._discards and self.gradients.ready([p.grad for p in self._owners() if p.grad is not None]):
                step(closure)

        optimizer.step = guarded  # type: ignore[assignment]
        # Where its own norm cannot be switched off, it would skip steps before `guarded` sees them.
        finite = torch.ones((), device=self._workers.device)
        if self.zero_stage == 3:
            self._engine.optimizer._get_norm_groups = lambda: [finite]
        elif self._offloads:
            self._engine.optimizer.scaled_global_norm = lambda: finite

    def _places(self) -> list[_Place]:
        """Where in which flat fp32 partition of ZeRO this worker's share of each parameter lies."""
        zero = self._engine.optimizer
        out = []
        for index, (name, p) in enumerate(self.module.named_parameters()):
            if self.zero_stage == 3:  # each parameter is cut into equal parts, the last of them padded
                group, at, length = zero.grad_position[zero.get_param_id(p)]
                flat, start = zero.fp32_partitioned_groups_flat[group], self._workers.rank * length
                numel = max(0, min(length, p.ds_numel - start))  # type: ignore[attr-defined]  # set by ZeRO
                out.append(_Place(index, name, self._shapes[name], flat, at, start, numel))
            elif (mapping := p._hp_mapping) is not None:  # type: ignore[attr-defined]  # set by ZeRO
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                inside, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                out.append(_Place(index, name, p.shape, flat, here.start, inside.start, here.numel))
        return out

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose state holds the moments: of whole parameters (ZeRO 0) or of flat partitions."""
        optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Accumulate this worker's share of the gradient."""
        self._engine.backward(self.gradients.scaled(loss))
        if self.zero_stage == 3:  # or the next slice's gradient would replace this one's; the engine's forward does it
            self._engine.optimizer.clear_backward_seen_flag()

    def step(self, lr_factor: float = 1.0) -> None:
        """Average the accumulated gradients over the workers and step; gradients are cleared.

        Args:
            lr_factor: what the learning rate is multiplied by in this step.
        """
        for group, lr in zip(self.torch_optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * lr_factor
        self._engine.step()

    def discard(self) -> None:
        """Clear the accumulated gradients without a step: DeepSpeed goes its whole way, the optimizer does nothing."""
        self._discards = True
        try:
            self._engine.step()
        finally:
            self._discards = False
        self.gradients.leave_out()

    def renew_optimizer(self) -> None:
        """Forget the optimizer's moments and step counts, in place: ZeRO holds on to these tensors."""
        for state in self.torch_optimizer.state.values():
            for value in state.values():
                value.zero_()

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.torch_optimizer.param_groups[0]["lr"])

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a loss or gradient was not finite, or a gradient too long."""
        return self.gradients.skipped

    @property
    def lowers_its_scale(self) -> bool:
        """Whether a step that was left out may be the loss scale's fault: fp16, and there is something to halve."""
        return self.gradients.scale is not None and self.gradients.scale.value >= 1

    def readings(self) -> dict[str, float]:
        """Scalars for the journal, equal on all workers: learning rate, loss scale of fp16, steps left out if any."""
        values = {f"lr/{self.name}": self.lr}
        if self.gradients.scale is not None:
            values[f"loss_scale/{self.name}"] = self.gradients.scale.value
        if self.skipped_steps:
            values[f"skipped_steps/{self.name}"] = float(self.skipped_steps)
        return values

    def state_dict(self) -> dict[str, Any]:
        """What must survive besides tensors and the optimizer's step count: the loss scale."""
        return {} if self.gradients.scale is None else {"loss_scale": self.gradients.scale.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; a run that changes to fp16 starts with the initial scale."""
        if self.gradients.scale is not None and "loss_scale" in state:
            self.gradients.scale.load_state_dict(state["loss_scale"])

    @contextmanager
    def only_trained(self, others: Mapping[str, NetworkEngine]) -> Iterator[None]:
        """Freeze all `others` meanwhile: they stay part of the graph but collect no gradients."""
        frozen = [e for e in others.values() if e is not self]
        for engine in frozen:
            engine.module.requires_grad_(False)
        try:
            yield
        finally:
            for engine in frozen:
                engine.module.requires_grad_(True)

    def fragments(self) -> list[Fragment]:
        """This worker's share of the fp32 weights: live views that together cover every parameter once."""
        if self.zero_stage == 0:
            return [
                Fragment.share(name, p.data, self._workers.rank, self._workers.size)
                for name, p in self.module.named_parameters()
            ]
        return [place.fragment(place.flat.data) for place in self._places()]

    def state_fragments(self) -> dict[str, list[Fragment]]:
        """Optimizer state key -> this worker's share of it, cut like :meth:`fragments`. Empty before the first step."""
        out: dict[str, list[Fragment]] = {}
        state = self.torch_optimizer.state
        if self.zero_stage == 0:
            for name, p in self.module.named_parameters():
                for key, value in state.get(p, {}).items():
                    if value.shape == p.shape:
                        share = Fragment.share(name, value, self._workers.rank, self._workers.size)
                        out.setdefault(key, []).append(share)
            return out
        for place in self._places():
            for key, value in state.get(place.flat, {}).items():
                if value.shape == place.flat.shape:
                    out.setdefault(key, []).append(place.fragment(value))
        return out

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every whole parameter; at ZeRO 3 the module's own tensors are empty between forward passes."""
        return dict(self._shapes)

    def _owners(self) -> list[Tensor]:
        """Tensors that the torch optimizer keeps state for."""
        if self.zero_stage == 3:  # which hands partitions to the optimizer only while it steps
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.torch_optimizer.param_groups for p in group["params"]]

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers, live; equal on all workers after every update."""
        parameters = {name for name, _ in self.module.named_parameters()}
        return {k: v for k, v in self.module.state_dict(keep_vars=True).items() if k not in parameters}

    def optimizer_steps(self) -> float:
        """The optimizer's own step counter (Adam's bias correction)."""
        for owner in self._owners():
            step = self.torch_optimizer.state.get(owner, {}).get("step")
            if step is not None:
                return float(step)
        return 0.0

    def allocate_state(self, keys: list[str], steps: float) -> None:
        """Create zero optimizer state with these keys, to be filled from a checkpoint."""
        state = self.torch_optimizer.state
        for owner in self._owners():
            if keys:
                state[owner] = {"step": torch.tensor(steps), **{key: torch.zeros_like(owner) for key in keys}}
        if self.zero_stage in (1, 2) and keys:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def restored(self) -> None:
        """Tell DeepSpeed that the fp32 weights changed: push them into the module on every worker."""
        if self.zero_stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        if self.zero_stage == 3:
            for group in range(len(self._owners())):
                self._engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)


def build_engines(
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, OptimizerDefaults],
    training: TrainingSpec,
    workers: Workers,
    updates: Sequence[Update] = (),
) -> dict[str, NetworkEngine]:
    """An engine for every network.

    Args:
        networks: name -> module.
        optimizers: the paper's optimizer of each.
        training: the job's settings.
        workers: the group.
        updates: the system's updates; lazy ones among them correct the optimizer that they share.
    """
    return {
        name: NetworkEngine(
            name,
            module,
            build_optimizer(
                name,
                module,
                optimizers[name],
                training.optimizers.get(name, OptimizerSpec()),
                lazy_correction(updates, name),
                offloaded=training.offload == "optimizer",
            ),
            training,
            workers,
        )
        for name, module in networks.items()
    }
