"""Guards: what happens when the numbers of a run go wrong.

An update whose loss or gradient is not finite is left out. After more than ``max_skips`` of them in a row the run goes
back to its last checkpoint, and after ``max_rollbacks`` of those it stops. Signs of collapse
(:mod:`bessemer.training.collapse`) may ask for the same.

Decisions come from values that were summed over the workers, so all workers decide alike. A run that went back draws
other latents and reads other images than before, or it would only repeat itself; both are functions of the seed and of
the number of rollbacks, which is kept in checkpoints. So the run stays a pure function of its job: killed and resumed
from an older checkpoint, it makes the same mistake again, goes back again and takes the same way from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bessemer.errors import TrainingError
from bessemer.nn.update_state import UpdateState
from bessemer.spec.job import JobSpec
from bessemer.systems.contract import Clock, Update
from bessemer.training.distributed import Workers
from bessemer.training.engine import NetworkEngine
from bessemer.training.rng import derive_seed

__all__ = ["Guards", "RollBack"]

_FAR = 1 << 40
"""Images between the data of a run and that of the run after a rollback: beyond what any run reads."""


class RollBack(Exception):  # noqa: N818  # asks for something; whether it is an error is decided above
    """The run must go back to a checkpoint. Raised on all workers alike.

    Args:
        reason: what went wrong, for people: the beginning of a sentence.
        fix: what to change when it cannot be mended by going back.
        latest: newest moment, in images, that may be gone back to; any when unset.
    """

    def __init__(self, reason: str, fix: str, latest: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.fix, self.latest = reason, fix, latest


@dataclass
class _Row:
    """Updates of one name that were left out one after the other."""

    network: str
    began: int
    """Images seen before the first of them."""
    count: int = 0


@dataclass
class _Rollback:
    """The furthest point at which the run went back, and where it went; in images."""

    failed_at: int
    went_to: int


class Guards:
    """Skips, rollbacks and the random stream that follows from them.

    Attributes:
        rollbacks: times that this run went back so far.
    """

    def __init__(self, job: JobSpec, workers: Workers, write: Callable[..., None]) -> None:
        self._job, self._spec, self._workers, self._write = job, job.guards, workers, write
        self.rollbacks = 0
        self._rows: dict[str, _Row] = {}
        self._last: _Rollback | None = None
        self._older_than: int | None = None
        self._skipped_before = 0
        self._refused: str | None = None

    # What depends on the number of rollbacks.

    @property
    def seed(self) -> int:
        """Seed of latents, noise and augmentation: the job's, and another one after each rollback."""
        return derive_seed(self._job.seed, "rollback", self.rollbacks) if self.rollbacks else self._job.seed

    def data_position(self, nimg: int) -> int:
        """Where the batch at `nimg` is read from the stream: elsewhere after each rollback."""
        batch = self._job.training.batch_size
        return nimg + self.rollbacks * (-(-_FAR // batch) * batch)

    @property
    def lr_factor(self) -> float:
        """What learning rates are multiplied by."""
        return self._spec.rollback_lr_factor**self.rollbacks

    # Updates that are left out.

    @torch.no_grad()
    def accept(self, update: Update, engine: NetworkEngine, losses: Sequence[Tensor], state: UpdateState) -> bool:
        """Whether the forward passes of all slices were finite: losses, and what layers summed up. Collective.

        What layers summed up is then that of all workers, to be committed if the update is accepted.
        The answer is waited for. That costs little where the optimizer waits for its gradients anyway.
        """
        self._skipped_before, self._refused = engine.skipped_steps, None
        if self._job.training.sanitize_gradients:  # the job asks for the step, whatever came before it
            self._sum_over_workers(state)
            return True
        values = torch.stack([loss.detach().float().reshape(()) for loss in losses])
        sums = state.pending()
        seen = torch.cat([values, torch.stack(torch._foreach_norm(sums)).float()]) if sums else values
        count = (~seen.isfinite()).sum().float()
        self._sum_over_workers(state, count)  # one message for both: each costs a wait for the slowest worker
        if not count:
            return True
        mine = [str(value) for value in values.tolist() if not abs(value) < float("inf")]
        where = [f"{', '.join(bad)} on worker {rank}" for rank, bad in enumerate(self._workers.gather(mine)) if bad]
        self._refused = f"loss/{update.name} was {' and '.join(where)}" if where else f"{update.name} overflowed"
        return False

    def _sum_over_workers(self, state: UpdateState, *also: Tensor) -> None:
        if self._workers.size > 1:
            state.sum(self._workers.sum, *also)

    def stepped(self, update: Update, engine: NetworkEngine, nimg: int) -> None:
        """Learn that an update is over: its step was made, or its gradients were discarded.

        Raises:
            RollBack: too many updates in a row were left out.
        """
        if self._refused is not None:
            self._skip(update, self._refused, nimg)
        elif engine.skipped_steps > self._skipped_before and engine.gradients.too_long:
            limit = self._job.training.skip_gradient_norm
            what = f"the gradient of {engine.name} was longer than {limit:g} in {update.name}"
            self._skip(update, f"{what} (training.skip_gradient_norm)", nimg)
        elif engine.skipped_steps > self._skipped_before and not engine.lowers_its_scale:
            self._skip(update, f"a gradient of {engine.name} was not finite in {update.name}", nimg)
        else:
            self._rows.pop(update.name, None)

    def _skip(self, update: Update, what: str, nimg: int) -> None:
        row = self._rows.setdefault(update.name, _Row(update.network, nimg))
        row.count += 1
        if row.count == 1:  # one line for each row of them
            self._write("event", nimg, event="update_skipped", update=update.name, reason=what)
        if row.count > self._spec.max_skips:
            # A checkpoint from the row's beginning or later may hold the weights that it comes from, of any network.
            name, first = min(self._rows.items(), key=lambda item: item[1].began)
            also = "" if name == update.name else f"; {name} has failed since {first.began / 1000:g} kimg"
            raise RollBack(
                f"{what}, {row.count} times in a row (guards.max_skips: {self._spec.max_skips}){also}",
                f"Lower training.optimizers.{first.network}.lr, set training.gradient_clipping, or let each rollback "
                "cut the learning rates with guards.rollback_lr_factor.",
                latest=first.began - 1,
            )

    # Going back.

    def count_rollback(self, why: RollBack, clock: Clock) -> None:
        """Count a rollback, from which :attr:`seed`, :meth:`data_position` and :attr:`lr_factor` follow.

        Raises:
            TrainingError: there were enough.
        """
        if self.rollbacks >= self._spec.max_rollbacks:
            raise self.give_up(why, clock, f"after {self.rollbacks} rollbacks (guards.max_rollbacks)")
        self.rollbacks += 1
        last, self._older_than = self._last, None
        self._last = _Rollback(clock.nimg, clock.nimg)
        if last is not None and clock.nimg <= last.failed_at:
            # It got no further than before: what it went back to was sick already.
            self._older_than, self._last.failed_at = last.went_to, last.failed_at
        self._write(
            "event",
            clock.nimg,
            event="rolled_back",
            reason=why.reason,
            rollbacks=self.rollbacks,
            lr_factor=self.lr_factor,
        )

    def bounds(self, why: RollBack) -> list[int | None]:
        """Newest moments, in images, that may be gone back to, in the order in which to try them.

        A run that fails again before it gets past the point of its last failure goes further back than last time, if
        there is something.
        """
        return [why.latest] if self._older_than is None else [self._older_than - 1, why.latest]

    def went_back(self, nimg: int) -> None:
        """Learn where the run stands after a rollback."""
        assert self._last is not None
        self._last.went_to = nimg

    @staticmethod
    def no_checkpoint(why: RollBack) -> str:
        """Why the run cannot go back."""
        if why.latest is None:
            return "with no checkpoint to go back to (checkpoint.every_kimg)"
        return (
            f"with no checkpoint from before {(why.latest + 1) / 1000:g} kimg to go back to (checkpoint.every_kimg, "
            "checkpoint.keep_last)"
        )

    @staticmethod
    def give_up(why: RollBack, clock: Clock, when: str) -> TrainingError:
        """The error that ends the run."""
        return TrainingError(f"stopped at {clock.kimg:g} kimg {when}: {why.reason}. {why.fix}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        last = None if self._last is None else asdict(self._last)
        return {
            "rollbacks": self.rollbacks,
            "last": last,
            "rows": {name: asdict(row) for name, row in self._rows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; a rollback counted since it was written stays counted."""
        if state["rollbacks"] >= self.rollbacks:
            self.rollbacks = int(state["rollbacks"])
            self._last = None if state["last"] is None else _Rollback(**state["last"])
        self._rows = {name: _Row(**row) for name, row in state["rows"].items()}
