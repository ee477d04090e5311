"""Signs that an adversarial run collapses: rules with a threshold in the job, over what is measured while it trains.

- `saturation`: the discriminator tells real from generated images so well that the generator learns nothing.
- `diversity`: generated images of one class are nearly alike, compared with real ones of one class.
- `spectral`: the largest singular value of a weight grows fast; in BigGAN's generator that comes before the collapse
  (Brock, Donahue and Simonyan 2019, arXiv:1809.11096, section 4.1).

Everything is judged from values that are equal on all workers. What the rules remember is kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.errors import TrainingError
from bessemer.nn.modes import evaluation_mode
from bessemer.spec.job import GuardsSpec
from bessemer.systems.contract import Batch, Clock, System
from bessemer.training.distributed import Workers
from bessemer.training.guards import RollBack
from bessemer.training.rng import generator

__all__ = ["CollapseWatch", "class_distances", "largest_singular_value"]

_LEAST_LOOKS = 5
"""Looks in a row that must agree, however far apart they are: with huge batches a thousand images are few updates."""
_SLICES = 8
"""Slices of the global batch whose images are compared."""
_POWER_ITERATIONS = 8


@dataclass
class _Streak:
    """Looks in a row at which a rule saw what it is looking for."""

    began: int | None = None
    """Images seen at the first of them."""
    looks: int = 0
    told: bool = False

    def saw(self, bad: bool, nimg: int, for_kimg: float = 0.0, looks: int = _LEAST_LOOKS) -> bool:
        """Whether suspicion begins with this look: once per streak."""
        if not bad:
            self.began, self.looks, self.told = None, 0, False
            return False
        self.began = nimg if self.began is None else self.began
        self.looks += 1
        lasted = nimg - self.began >= for_kimg * 1000 and self.looks >= looks
        self.told, before = self.told or lasted, self.told
        return lasted and not before


def class_distances(images: Tensor, labels: Tensor) -> Tensor:
    """Root mean square distances between images [N, ...] of the same class: their sum and their number, float64 [2]."""
    flat = images.flatten(1).double()
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    same = (labels[:, None] == labels[None, :]).triu(1)
    return torch.stack([distances[same].sum(), same.sum().double()])


@torch.no_grad()
def largest_singular_value(weight: Tensor) -> Tensor:
    """Estimate of the largest singular value of a weight, flattened to [out, rest]: a scalar, never above it."""
    W = weight.detach().flatten(1).float()
    # The start is fixed: looks at different moments can be compared, and nothing has to be remembered.
    u = torch.linspace(0.5, 1.5, W.shape[0], device=W.device) * (
        1 - 2 * (torch.arange(W.shape[0], device=W.device) % 2)
    )
    for _ in range(_POWER_ITERATIONS):
        u = F.normalize(W @ F.normalize(W.T @ u, dim=0), dim=0)
    sigma: Tensor = torch.linalg.vector_norm(W.T @ u)
    return sigma


class CollapseWatch:
    """Measures, judges, and does what the job asks for. All methods but the state's are collective.

    Attributes:
        readings: scalars of the last look, for the journal.
    """

    def __init__(self, spec: GuardsSpec, system: System, workers: Workers, write: Callable[..., None]) -> None:
        self._spec, self._system, self._workers, self._write = spec, system, workers, write
        self._is_adversarial = "generator" in system.networks()  # in whatever family: video, translation
        self._streaks = {name: _Streak() for name in ("saturation", "diversity", "spectral")}
        self._real = torch.zeros(2, dtype=torch.float64)  # distances of real images, over the whole run
        self._sigmas: list[tuple[int, dict[str, float]]] = []
        self.readings: dict[str, float] = {}

    def logged(self, values: Mapping[str, float], clock: Clock) -> None:
        """Judge a line of metrics: `scores/real`, `scores/fake` and the loss of the update `discriminator`.

        Raises:
            RollBack, TrainingError: the job asks for it.
        """
        rule = self._spec.saturation
        names = ("scores/real", "scores/fake", "loss/discriminator")
        if rule is None or not self._is_adversarial or not all(name in values for name in names):
            return
        real, fake, loss = (values[name] for name in names)
        # A critic's loss has no floor: it goes far below zero as the scores part.
        bad = real - fake >= rule.scores_apart and abs(loss) <= rule.loss
        if self._streaks["saturation"].saw(bad, clock.nimg, rule.for_kimg):
            numbers = {"scores_apart": real - fake, "loss": loss}
            self._suspect("saturation", rule.action, numbers, clock, "Lower the discriminator's learning rate, or")

    def look(self, batches: list[Batch], slices: list[int], seed: int, clock: Clock) -> None:
        """Draw a few images, measure the weights, and judge both.

        Args:
            batches: real images of the slices that this worker owns.
            slices: their indices in the global batch.
            seed: of the random stream.
            clock: now.

        Raises:
            RollBack, TrainingError: the job asks for it.
        """
        if not self._is_adversarial:
            return
        self.readings = {}
        self._look_at_samples(batches, slices, seed, clock)
        self._look_at_weights(clock)

    def _look_at_samples(self, batches: list[Batch], slices: list[int], seed: int, clock: Clock) -> None:
        rule, device = self._spec.diversity, self._workers.device
        if rule is None:
            return
        sums = torch.zeros(2, 2, dtype=torch.float64, device=device)
        networks = [self._system.networks()[name] for name in self._system.sampled_networks]
        with torch.no_grad(), evaluation_mode(networks):
            for index, batch in zip(slices, batches, strict=True):
                if index < _SLICES:
                    real = batch.to(device)
                    # Every class twice at least: pairs, however many classes there are. Inputs are as they come.
                    half = real.labels[: (len(batch) + 1) // 2]
                    asked = real if self._system.given else Batch(None, half.repeat(2))
                    drawn = self._system.sample_for(asked, generator(device, seed, "diversity", clock.nimg, index))
                    sums[0] += class_distances(drawn, asked.labels)
                    sums[1] += class_distances(real[self._system.sample_field], real.labels)
        fakes, reals = self._workers.sum(sums).cpu()
        self._real += reals
        between_fakes, between_real = ((total / count).item() for total, count in (fakes, self._real))
        if not (between_real > 0 and fakes[1] > 0):  # no class came twice yet
            return
        ratio = between_fakes / between_real
        self.readings["collapse/diversity"] = ratio
        if self._streaks["diversity"].saw(ratio < rule.least, clock.nimg, rule.for_kimg):
            numbers = {"diversity": ratio, "least": rule.least}
            self._suspect("diversity", rule.action, numbers, clock, "Lower the generator's learning rate, or")

    def _look_at_weights(self, clock: Clock) -> None:
        rule = self._spec.spectral
        if rule is None:
            return
        weights = [(f"{n}.{key}", p) for n, net in self._system.networks().items() for key, p in _matrices(net)]
        mine = torch.zeros(len(weights), device=self._workers.device)
        for i in range(self._workers.rank, len(weights), self._workers.size):
            mine[i] = largest_singular_value(weights[i][1])
        # Four digits: they are kept in checkpoints for each look.
        found = {key: float(f"{s:.4g}") for (key, _), s in zip(weights, self._workers.sum(mine).tolist(), strict=True)}
        for name in self._system.networks():
            self.readings[f"collapse/sigma_{name}"] = max(s for k, s in found.items() if k.startswith(f"{name}."))
        begin = clock.nimg - rule.within_kimg * 1000
        self._sigmas = [(at, sigmas) for at, sigmas in self._sigmas if at >= begin]
        # Below 1 a weight is still leaving its initialisation.
        self._sigmas.append((clock.nimg, found))
        since, first = self._sigmas[0]
        growth = {key: sigma / max(1.0, first[key]) for key, sigma in found.items()}
        worst = max(growth, key=lambda k: growth[k])
        if self._streaks["spectral"].saw(growth[worst] > rule.growth, clock.nimg, looks=1):
            numbers = {"weight": worst, "sigma": found[worst], "growth": growth[worst], "since_kimg": since / 1000}
            self._suspect("spectral", rule.action, numbers, clock, "Lower the learning rates, or")

    def _suspect(self, rule: str, action: str, numbers: dict[str, Any], clock: Clock, fix: str) -> None:
        self._write("event", clock.nimg, event="collapse_suspected", rule=rule, action=action, **numbers)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        reason = f"collapse suspected by guards.{rule} ({shown})"
        fix = f"{fix} set guards.{rule}.action to warn."
        if action == "stop":
            raise TrainingError(f"stopped at {clock.kimg:g} kimg: {reason}. {fix}")
        if action == "rollback":
            began = self._streaks[rule].began
            assert began is not None
            raise RollBack(reason, fix, latest=began - 1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "streaks": {name: asdict(streak) for name, streak in self._streaks.items()},
            "real": self._real.tolist(),
            "sigmas": self._sigmas,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._streaks = {name: _Streak(**streak) for name, streak in state["streaks"].items()}
        self._real = torch.tensor(state["real"], dtype=torch.float64)
        self._sigmas = [(int(at), dict(sigmas)) for at, sigmas in state["sigmas"]]


def _matrices(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Weights of more than one dimension."""
    return [(key, p) for key, p in network.named_parameters() if p.dim() > 1 and min(p.flatten(1).shape) > 1]
