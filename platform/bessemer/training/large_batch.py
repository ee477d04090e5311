"""LARS and LAMB: optimizers for large batches, which scale each parameter's step to the parameter's own length.

The lengths are those of whole parameters. ZeRO 1 and 2 cut parameters into pieces that lie on several workers; then
:meth:`LayerWise.cut` says which run of elements belongs to which parameter, and squares are summed over the workers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LAMB", "LARS", "LayerWise", "Run"]


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a flat tensor that belong to one parameter."""

    parameter: int
    """Index of the parameter in its network."""
    start: int
    """First element in the flat tensor."""
    numel: int


class LayerWise(torch.optim.Optimizer):
    """Base of both: norms per parameter, wherever its pieces lie."""

    def __init__(self, params: Iterable[Tensor], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._runs: list[Run] | None = None
        self._count = sum(len(group["params"]) for group in self.param_groups)
        self._index: Tensor | None = None
        self._sum: Callable[[Tensor], Tensor] = lambda squares: squares

    def cut(self, runs: list[Run], sum_over_workers: Callable[[Tensor], Tensor]) -> None:
        """From now on there is one flat tensor, of which `runs` (possibly none) are this worker's share.

        Args:
            runs: pieces of parameters in the flat tensor; what no run covers is padding and stays as it is.
            sum_over_workers: sums a tensor over the workers, in place.
        """
        self._runs, self._sum = runs, sum_over_workers

    def _pieces(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._runs is None:
            return tensors
        (flat,) = tensors
        return [flat.narrow(0, run.start, run.numel) for run in self._runs]

    def _norms(self, *of: list[Tensor]) -> list[Tensor]:
        """For each list of pieces: the norm of the parameter that each piece belongs to, [pieces]. Collective."""
        if self._index is None:
            owners = range(self._count) if self._runs is None else [run.parameter for run in self._runs]
            device = self.param_groups[0]["params"][0].device
            self._index = torch.tensor(list(owners), dtype=torch.int64, device=device)
        squares = torch.zeros(len(of), self._count, device=self._index.device)
        for row, pieces in zip(squares, of, strict=True):
            if pieces:
                row.index_add_(0, self._index, torch.stack(torch._foreach_norm(pieces)).square())
        norms = self._sum(squares).sqrt()
        return [row[self._index] for row in norms]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # DeepSpeed passes no closure
        """One step from the gradients that the parameters hold."""
        assert closure is None
        (group,) = self.param_groups
        weights = [p for p in group["params"] if p.grad is not None]
        if weights:
            gradients = [p.grad for p in weights]
            self._step(group, weights, gradients)

    @abstractmethod
    def _step(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None: ...

    def _state(self, weights: list[Tensor], *keys: str) -> list[list[Tensor]]:
        """State tensors under each key, zero at first; counts the step."""
        for p in weights:
            state = self.state[p]
            state.setdefault("step", torch.tensor(0.0))
            state["step"] += 1
            for key in keys:
                state.setdefault(key, torch.zeros_like(p))
        return [[self.state[p][key] for p in weights] for key in keys]


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over/under, and 1 where either is zero: a parameter that is still zero must be able to move."""
    return torch.where((over > 0) & (under > 0), over / under, torch.ones_like(over))


class LAMB(LayerWise):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2), with φ the identity.

    Args:
        params: all parameters of a network.
        lr: learning rate η.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: λ.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _step(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        m, v = self._state(weights, "exp_avg", "exp_avg_sq")
        t = float(self.state[weights[0]]["step"])
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta2**t))
        torch._foreach_add_(root, group["eps"])
        update = torch._foreach_div(torch._foreach_div(m, 1 - beta1**t), root)  # r_t
        torch._foreach_add_(update, weights, alpha=group["weight_decay"])
        xs, us = self._pieces(weights), self._pieces(list(update))
        x_norm, u_norm = self._norms(xs, us)
        if xs:
            steps = torch._foreach_mul(us, list((_ratio(x_norm, u_norm) * -group["lr"]).unbind()))
            torch._foreach_add_(xs, steps)


class LARS(LayerWise):
    """LARS (You, Gitman and Ginsburg 2017, arXiv:1708.03888, algorithm 1).

    Args:
        params: all parameters of a network.
        lr: global learning rate γ.
        momentum: m.
        trust: trust coefficient η, the largest relative change of a parameter per step at γ = 1.
        weight_decay: β.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        momentum: float = 0.9,
        trust: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})

    def _step(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        (v,) = self._state(weights, "momentum_buffer")
        decay = group["weight_decay"]
        ws, gs, vs = self._pieces(weights), self._pieces(gradients), self._pieces(v)
        w_norm, g_norm = self._norms(ws, gs)
        if not ws:
            return
        moving = (w_norm > 0) & (g_norm > 0)
        local = torch.where(moving, group["trust"] * w_norm / (g_norm + decay * w_norm), torch.ones_like(w_norm))
        steps = torch._foreach_add(gs, ws, alpha=decay)
        torch._foreach_mul_(steps, list((local * group["lr"]).unbind()))
        torch._foreach_mul_(vs, group["momentum"])
        torch._foreach_add_(vs, steps)
        torch._foreach_sub_(ws, vs)
