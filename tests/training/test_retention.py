"""Which checkpoints stay."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bessemer.spec.job import CheckpointSpec
from bessemer.training.checkpoint_files import kimg_name, nimg_of
from bessemer.training.retention import expendable


def paths(*nimg: int) -> list[Path]:
    return [Path(kimg_name(n)) for n in nimg]


def kept_after(spec: CheckpointSpec, saves: list[int], scores: dict[int, float] | None = None) -> list[int]:
    """Save at each moment and retain each time, as a run does."""
    here: list[Path] = []
    for nimg in saves:
        (new,) = paths(nimg)
        here = sorted({*here, new})
        known = {n: v for n, v in (scores or {}).items() if n <= nimg}
        here = [p for p in here if p not in expendable(here, new, spec, known)]
    return [nimg_of(p) for p in here]


def test_the_last_ones_stay() -> None:
    assert kept_after(CheckpointSpec(keep_last=2), [1000, 2000, 3000, 4000]) == [3000, 4000]


def test_the_first_of_each_stretch_stays_for_ever() -> None:
    spec = CheckpointSpec(every_kimg=1, keep_last=1, keep_every_kimg=3)
    # a batch of 64 does not meet the multiples; 4500 was an interruption
    assert kept_after(spec, [1024, 2048, 3008, 4032, 4500, 5056, 6016, 7040, 9024, 10048]) == [3008, 6016, 9024, 10048]


def test_the_best_stays_until_a_better_one_comes() -> None:
    spec = CheckpointSpec(keep_last=1, keep_best="kid_efflite0")
    scores = {2000: 0.5, 3000: 0.9, 4000: 0.7}
    assert kept_after(spec, [1000, 2000, 3000, 4000], scores) == [2000, 4000]
    assert kept_after(spec, [1000, 2000, 3000, 4000, 5000, 6000], {**scores, 5000: 0.1}) == [5000, 6000]


def test_one_that_was_written_behind_others_stays() -> None:
    """The run went back to before some that looked sound: what it wrote last must survive."""
    here = paths(1000, 2000, 3000, 4000)
    assert expendable(here, here[1], CheckpointSpec(keep_last=1)) == [here[0], here[2]]


@given(
    saves=st.lists(st.integers(1, 60_000), unique=True, min_size=1, max_size=20).map(sorted),
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 30),
    scores=st.dictionaries(st.integers(1, 60_000), st.floats(0, 1), max_size=9),
)
def test_what_each_policy_promises(saves: list[int], last: int, every: int | None, scores: dict[int, float]) -> None:
    spec = CheckpointSpec(every_kimg=0.001, keep_last=last, keep_every_kimg=every, keep_best="kid_efflite0")
    scores |= {saves[len(saves) // 2]: 0.5}
    kept = kept_after(spec, saves, scores)
    assert set(saves[-last:]) <= set(kept)
    best = min(scores[n] for n in saves if n in scores)
    assert any(scores.get(n) == best for n in kept)
    firsts = (
        {min(n for n in saves if n // (every * 1000) == s) for s in {n // (every * 1000) for n in saves} if s}
        if every
        else set()
    )
    assert firsts <= set(kept)
    assert len(kept) <= last + 1 + len(firsts)
