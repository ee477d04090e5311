"""What happens to a network's gradients between the backward pass and the step, alike at every ZeRO stage.

The engine calls :meth:`Gradients.ready` with what the optimizer is about to use: gradients averaged over the workers,
whole at ZeRO 0, this worker's flat partition at 1 and 2. Norm, clipping, sanitising and the decision to skip a step
are made here and nowhere else, because DeepSpeed's own differ from stage to stage (stage 0 lets a NaN into the
weights, 1 and 2 skip the step) and wait for the device several times per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bessemer.spec.job import TrainingSpec
from bessemer.training.distributed import Workers

__all__ = ["Gradients", "LossScale"]


class LossScale:
    """Dynamic loss scale of one network in fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    Halved when a gradient overflows, doubled after `patience` steps in a row without. Every worker sees the same
    norm, so all of them move it alike.
    """

    def __init__(self, initial: float = 2.0**16, patience: int = 2000) -> None:
        self.value, self.steps, self._patience = initial, 0, patience

    def moved(self, finite: bool) -> None:
        """Learn whether the last step's gradients were finite."""
        if not finite:
            self.value, self.steps = self.value / 2, 0
        else:
            self.steps += 1
            if self.steps == self._patience:
                self.value, self.steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.steps = float(state["value"]), int(state["steps"])


class Gradients:
    """Norm, clipping, sanitising and skipping for one network.

    Attributes:
        norm: length of the last gradient before clipping, float32 on the device; ``None`` after a skipped step.
        skipped: steps left out so far because a gradient was not finite, or too long.
        too_long: whether the last gradient was finite and longer than `training.skip_gradient_norm`.
        scale: loss scale of fp16; ``None`` in other precisions.
    """

    def __init__(self, training: TrainingSpec, workers: Workers, *, sharded: bool) -> None:
        self._bound, self._sanitize = training.gradient_clipping, training.sanitize_gradients
        self._limit = training.skip_gradient_norm
        self._workers, self._sharded = workers, sharded
        self.norm: Tensor | None = None
        self.skipped, self.too_long = 0, False
        self.scale = LossScale() if training.precision == "fp16" else None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate. In fp16 a slice's share of it must not depend on how many workers share them."""
        return loss if self.scale is None else loss * (self.scale.value / self._workers.size)

    @torch.no_grad()
    def ready(self, gradients: list[Tensor]) -> bool:
        """Treat `gradients` in place and say whether the optimizer may step. Collective.

        The norm stays on the device. The one thing that is waited for is whether it is finite, and not even that
        where gradients are sanitised.
        """
        if self.scale is not None:
            torch._foreach_mul_(gradients, self._workers.size / self.scale.value)
        if self._sanitize:
            for g in gradients:  # the values of StyleGAN2-ADA's training loop
                torch.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5, out=g)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self._sharded:
            norm = self._workers.sum(norm.square()).sqrt()
        finite = self._sanitize or bool(norm.isfinite())
        if self.scale is not None:
            self.scale.moved(finite)
        self.too_long = finite and self._limit is not None and bool(norm > self._limit)
        if not finite or self.too_long:
            self.leave_out()
            return False
        self.norm = norm.to(self._workers.device)
        if self._bound is not None:
            torch._foreach_mul_(gradients, (self._bound / (norm + 1e-6)).clamp(max=1))
        return True

    def leave_out(self) -> None:
        """Count a step that is not made."""
        self.norm = None
        self.skipped += 1
