"""What a system cannot be trained with is refused by field, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bessemer.errors import SpecError
from bessemer.spec.job import TrainingSpec
from bessemer.systems.registry import build
from bessemer.training.checks import check_training


def test_weights_that_a_loss_reads_whole_are_not_scattered() -> None:
    spec = TrainingSpec.model_validate({"total_kimg": 1, "batch_size": 4, "slice_size": 4, "zero_stage": 3})
    with torch.device("meta"):
        regularised, plain = build("nvae", "tiny32"), build("nvae", "tiny32", {"spectral": 0.0})
    with pytest.raises(SpecError, match=r"zero_stage: 3 scatters the weights, and nvae's loss elbo reads them whole"):
        check_training(spec, regularised)
    check_training(spec, plain)
    check_training(spec.model_copy(update={"zero_stage": 2}), regularised)


def check(r1_gamma: float, **fields: Any) -> None:
    with torch.device("meta"):
        system = build("biggan", "tiny32", {"r1_gamma": r1_gamma}, {"channels": 1, "classes": 10})
    spec = TrainingSpec.model_validate({"total_kimg": 1, "batch_size": 4, "slice_size": 4, **fields})
    check_training(spec, system)


def test_what_is_right_is_let_through() -> None:
    check(1.0, zero_stage=2, compile=["generator"], optimizers={"discriminator": {"lr": 1e-3}})
    check(0.0, zero_stage=1, offload="optimizer")
    check(0.0, compile=["generator", "discriminator"])


@pytest.mark.parametrize(
    ("gamma", "fields", "message"),
    [
        (1.0, {"compile": ["discriminator"]}, r"training\.compile: discriminator has the second-order loss r1"),
        (0.0, {"compile": ["encoder"]}, r"training\.compile: biggan has no network 'encoder'"),
        (0.0, {"optimizers": {"encoder": {}}}, r"training\.optimizers\.encoder: biggan has no network"),
        (1.0, {"zero_stage": 3}, r"training\.zero_stage: 3 computes wrong gradients .* has r1"),
        (1.0, {"zero_stage": 2, "offload": "optimizer"}, r"training\.offload: optimizer copies .* biggan has r1; set"),
        (0.0, {"zero_stage": 3}, r"training\.zero_stage: 3 scatters .* generator's spectral normalisation"),
    ],
)
def test_what_is_wrong_is_refused(gamma: float, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check(gamma, **fields)
