"""The learning rate as a function of the image clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.spec.job import TrainingSpec
from bessemer.training.schedule import lr_factor


def training(batch: int = 100, total_kimg: float = 10, **fields: object) -> TrainingSpec:
    return TrainingSpec.model_validate({"total_kimg": total_kimg, "batch_size": batch, "slice_size": batch, **fields})


@given(nimg=st.integers(0, 10**9))
def test_rates_are_constant_unless_asked(nimg: int) -> None:
    assert lr_factor(training(), nimg) == 1


@given(batch=st.integers(1, 8192), reference=st.integers(1, 8192))
def test_scaling_with_the_batch(batch: int, reference: int) -> None:
    linear = lr_factor(training(batch, 100, lr_scaling="linear", lr_reference_batch=reference), 0)
    root = lr_factor(training(batch, 100, lr_scaling="sqrt", lr_reference_batch=reference), 0)
    assert linear == pytest.approx(batch / reference)
    assert root**2 == pytest.approx(linear)


def test_warm_up_ends_at_the_full_rate() -> None:
    spec = training(lr_schedule={"warmup_kimg": 1})
    assert [lr_factor(spec, n) for n in (0, 100, 800, 900, 1000, 9900)] == pytest.approx([0.1, 0.2, 0.9, 1, 1, 1])


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_decay_from_the_warm_up_to_the_end(decay: str, middle: float) -> None:
    spec = training(lr_schedule={"warmup_kimg": 2, "decay": decay, "final": 0.1})
    assert [lr_factor(spec, n) for n in (2000, 6000, 10_000, 12_000)] == pytest.approx([1, middle, 0.1, 0.1])


def test_decay_may_wait() -> None:
    """SNGAN: the full rate for 400,000 of 450,000 steps."""
    schedule = {"warmup_kimg": 1, "decay": "linear", "decay_from_kimg": 8}
    spec = training(lr_schedule=schedule)
    assert [lr_factor(spec, n) for n in (400, 1000, 8000, 8500, 9900)] == pytest.approx([0.5, 1, 1, 0.75, 0.05])


def test_cosine_starts_and_ends_flat() -> None:
    """At a third of the way cos(π/3) = 1/2, so three quarters are left; linear decay leaves two thirds."""
    cosine, linear = (training(total_kimg=3, lr_schedule={"decay": d}) for d in ("cosine", "linear"))
    assert lr_factor(cosine, 1000) == pytest.approx(0.75)
    assert lr_factor(linear, 1000) == pytest.approx(2 / 3)


@given(
    nimg=st.integers(0, 200),
    warmup=st.floats(0, 9.9),
    decay=st.sampled_from(["none", "linear", "cosine"]),
    final=st.floats(0, 1),
)
def test_factors_lie_between_zero_and_one_and_never_rise_after_the_warm_up(
    nimg: int, warmup: float, decay: str, final: float
) -> None:
    spec = training(lr_schedule={"warmup_kimg": warmup, "decay": decay, "final": final})
    now, next_ = lr_factor(spec, nimg * 100), lr_factor(spec, (nimg + 1) * 100)
    assert 0 <= now <= 1
    if nimg * 100 >= warmup * 1000:
        assert next_ <= now + 1e-12
    elif (nimg + 2) * 100 < warmup * 1000:
        assert next_ > now > 0
