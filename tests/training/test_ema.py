"""The average's weight, and fragments that cover everything once."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bessemer.spec.job import EmaSpec
from bessemer.training.distributed import Workers
from bessemer.training.ema import ema_beta
from bessemer.training.fragments import Fragment, gather_full


def test_half_life_is_in_images() -> None:
    spec = EmaSpec(half_life_kimg=10, rampup=None)
    beta = 1.0
    for _ in range(100):
        beta *= ema_beta(spec, 100, 0)
    assert beta == pytest.approx(0.5)  # 100 updates of 100 images: one half-life, whatever the batch


def test_stylegan2_ada_reference_value() -> None:
    assert ema_beta(EmaSpec(half_life_kimg=10, rampup=None), 32, 0) == pytest.approx(0.99778, abs=1e-5)


def test_rampup_forgets_the_random_start() -> None:
    spec = EmaSpec(half_life_kimg=10, rampup=0.05)
    assert ema_beta(spec, 32, 0) == 0
    assert ema_beta(spec, 32, 1000) == pytest.approx(0.5 ** (32 / 50))
    assert ema_beta(spec, 32, 10**9) == pytest.approx(0.5 ** (32 / 10_000))


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=3), world=st.integers(1, 9))
def test_shares_cover_a_tensor_exactly_once(shape: list[int], world: int) -> None:
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    shares = [Fragment.share("w", tensor, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([s.data for s in shares]), tensor.view(-1))
    assert [s.start for s in shares if s.data.numel()] == [int(s.data[0]) for s in shares if s.data.numel()]


@given(cuts=st.lists(st.integers(0, 11), max_size=4))
def test_gather_puts_fragments_where_they_belong(cuts: list[int]) -> None:
    a, b = torch.randn(3, 4), torch.randn(5)
    edges = sorted({0, 12, *cuts})
    parts = [Fragment("a", a.shape, i, a.view(-1)[i:j]) for i, j in pairwise(edges)]
    parts.append(Fragment("b", b.shape, 0, b))
    alone = Workers(0, 1, torch.device("cpu"))
    full = gather_full(parts, {"a": a.shape, "b": b.shape}, alone)
    assert torch.equal(full["a"], a)
    assert torch.equal(full["b"], b)
