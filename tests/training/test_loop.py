"""The image clock, who owns which slice, and generators that are functions of their purpose."""

from __future__ import annotations

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from bessemer.systems.contract import Clock
from bessemer.training.checkpoint_files import kimg_name
from bessemer.training.loop import owned_slices
from bessemer.training.rng import derive_seed, generator


@given(slices=st.integers(1, 64), size=st.integers(1, 64))
def test_every_slice_has_one_owner(slices: int, size: int) -> None:
    owners = [owned_slices(slices, rank, size) for rank in range(size)]
    assert sorted(chain.from_iterable(owners)) == list(range(slices))
    if slices % size == 0:
        assert {len(o) for o in owners} == {slices // size}


@given(every=st.integers(1, 50), batch=st.integers(1, 4000), steps=st.integers(1, 60))
def test_each_multiple_is_crossed_once(every: int, batch: int, steps: int) -> None:
    hits = [Clock((k + 1) * batch, k + 1).crossed(every, Clock(k * batch, k)) for k in range(steps)]
    passed = steps * batch // (every * 1000)
    assert sum(hits) == min(passed, len({(m * every * 1000 - 1) // batch for m in range(1, passed + 1)}))


def test_names_sort_by_time() -> None:
    names = [kimg_name(n) for n in (0, 32, 999, 1000, 12_800, 25_000_000)]
    assert names == sorted(names)
    assert kimg_name(12_800) == "kimg-000012.800"


def test_seeds_depend_on_every_part_of_the_purpose() -> None:
    purposes = [("a", 1), ("a", 2), ("b", 1), ("a1",), ("a", "1"), ("a", 1, 0), ("a|str:1:1",)]
    seeds = {derive_seed(s, *p) for s in (0, 1) for p in purposes}
    assert len(seeds) == 2 * len(purposes)
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_ignore_global_state() -> None:
    torch.manual_seed(1)
    a = torch.randn(4, generator=generator("cpu", 5, "z", 64, 0))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = torch.randn(4, generator=generator("cpu", 5, "z", 64, 0))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
