"""The slice size to try when memory is exhausted: legal, fitting, and the largest of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bessemer.errors import MachineError
from bessemer.spec.job import JobSpec
from bessemer.training.memory_advice import MemoryAdvice, MemoryUse, advice, fitting_slice_size, legal_slice_sizes

GIB = 1 << 30


def job(batch: int = 64, piece: int = 32, workers: int = 2, **training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "a",
            "system": {"name": "biggan", "preset": "tiny"},
            "data": {"path": "x"},
            "training": {"total_kimg": 1000, "batch_size": batch, "slice_size": piece, **training},
            "resources": {"workers": workers},
        }
    )


@given(
    pieces=st.integers(1, 12), piece=st.integers(1, 64), workers=st.integers(1, 4),
    held=st.integers(0, 90), wanted=st.integers(91, 400), completed=st.booleans(),
)  # fmt: skip
def test_what_is_advised_is_legal_fits_and_is_the_largest(
    pieces: int, piece: int, workers: int, held: int, wanted: int, completed: bool
) -> None:
    batch = pieces * piece * workers
    use = MemoryUse(100 * GIB, held * GIB, wanted * GIB, completed)
    found = fitting_slice_size(use, batch, piece, workers)
    job(batch, piece, workers)
    per_image = (wanted - held) / piece

    def fits(n: int) -> bool:
        return held + n * per_image <= held + 0.9 * (100 - held) + 1e-9 and (
            n < piece if completed else n <= piece // 2
        )

    if found is not None:
        job(batch, found, workers)  # a job takes it: it divides the batch, and workers own whole slices
        assert fits(found)
    larger = [n for n in range((found or 0) + 1, batch + 1) if batch % n == 0 and batch // n % workers == 0]
    assert not any(fits(n) for n in larger)


def test_legal_sizes() -> None:
    assert legal_slice_sizes(24, 1) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert legal_slice_sizes(24, 2) == [1, 2, 3, 4, 6, 12]


def test_the_message_names_the_size() -> None:
    text = advice(MemoryUse(16 * GIB, 4 * GIB, 20 * GIB, True), job(), 2, "cuda:1")
    assert text.startswith("training.slice_size: 32 images do not fit into the 16.00 GiB of cuda:1: 4.00 GiB hold")
    assert "an image takes about 0.50 GiB; start again with training.slice_size 16 (the batch stays 64;" in text


def test_where_nothing_smaller_fits_other_ways_are_named() -> None:
    text = advice(MemoryUse(16 * GIB, 15 * GIB, 80 * GIB, False), job(), 2, "cuda:0")
    assert "an image takes at least 2.03 GiB; no smaller slice size" in text
    assert "set training.zero_stage to 2, or set training.precision to bf16, or take a smaller preset" in text
    text = advice(MemoryUse(16 * GIB, 15 * GIB, 80 * GIB, False), job(precision="bf16", zero_stage=2), 2, "cuda:0")
    assert text.endswith("divides the batch fits: take a smaller preset or a larger device.")


def test_other_errors_and_the_cpu_are_left_alone() -> None:
    for error in (RuntimeError("x"), torch.OutOfMemoryError("y")):
        with pytest.raises(type(error), match=str(error)), MemoryAdvice(job(), 1, torch.device("cpu")).given():
            raise error


@pytest.mark.gpu
def test_a_real_gpu_that_runs_out() -> None:
    device = torch.device("cuda", 0)
    watch = MemoryAdvice(job(), 1, device)
    weights = torch.empty(GIB, dtype=torch.uint8, device=device)
    total = torch.cuda.mem_get_info(device)[1]
    with watch.given():
        activations = torch.empty(GIB, dtype=torch.uint8, device=device)
        del activations
    expected = r"training\.slice_size: 32 images do not fit .* training\.slice_size 16 "
    with pytest.raises(MachineError, match=expected), watch.given():
        torch.empty(2 * total, dtype=torch.uint8, device=device)
    assert weights.numel() == GIB
