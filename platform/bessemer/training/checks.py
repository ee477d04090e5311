"""Settings of a job that would train this system wrongly are refused before anything starts."""

from __future__ import annotations

from bessemer.errors import SpecError
from bessemer.nn.spectral import SpectralNorm
from bessemer.spec.job import TrainingSpec
from bessemer.systems.contract import System

__all__ = ["check_training"]


def check_training(training: TrainingSpec, system: System) -> None:
    """Check what depends on the system's networks and updates.

    Raises:
        SpecError: names the field, the value, the rule and the fix.
    """
    networks = ", ".join(system.networks())
    updates = {u.name: u for u in system.every_update()}.values()
    second = [u for u in updates if u.second_order]
    if why := system.refusal(training.batch_size // training.slice_size):
        raise SpecError(
            f"training.slice_size: {training.batch_size} / {training.slice_size} slices do not suit {system.name}: "
            f"{why}; change one of them."
        )
    for name in training.optimizers:
        if name not in system.networks():
            raise SpecError(f"training.optimizers.{name}: {system.name} has no network {name!r}; it has {networks}.")
    if training.zero_stage == 3 and second:
        raise SpecError(
            f"training.zero_stage: 3 computes wrong gradients for second-order losses, and {system.name} has "
            f"{', '.join(u.name for u in second)}; set training.zero_stage to 2 or lower."
        )
    if training.offload != "none" and second:
        raise SpecError(
            f"training.offload: {training.offload} copies gradients to the host while the backward pass goes on, "
            "which nobody has shown to be right with second-order losses on a GPU, and "
            f"{system.name} has {', '.join(u.name for u in second)}; set training.offload to none."
        )
    if training.zero_stage == 3 and (whole := [u.name for u in updates if u.whole_weights]):
        raise SpecError(
            f"training.zero_stage: 3 scatters the weights, and {system.name}'s loss {', '.join(whole)} reads them "
            "whole outside forward passes, to regularise them; set training.zero_stage to 2 or lower."
        )
    for name, network in system.networks().items():
        if training.zero_stage == 3 and any(isinstance(m, SpectralNorm) for m in network.modules()):
            raise SpecError(
                f"training.zero_stage: 3 scatters the weights, and {name}'s spectral normalisation reads them whole "
                "between forward passes; set training.zero_stage to 2 or lower."
            )
    if training.zero_stage == 3 and training.compile:
        raise SpecError(
            f"training.compile: {', '.join(training.compile)} cannot be compiled at training.zero_stage 3, which "
            "gathers weights in hooks; empty the list, or set training.zero_stage to 2 or lower."
        )
    for name in training.compile:
        if name not in system.networks():
            raise SpecError(f"training.compile: {system.name} has no network {name!r}; it has {networks}.")
        if through := [u.name for u in second if u.network == name]:
            raise SpecError(
                f"training.compile: {name} has the second-order loss {', '.join(through)}, and torch.compile cannot "
                f"differentiate a compiled network twice; remove {name} from the list."
            )
