import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bessemer.evaluation.sampling import SAMPLE_CHUNK, allocate_labels, draw_chunk, prepare, sampling_mode, to_uint8


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=20).filter(any), st.integers(1, 700))
def test_labels_have_the_proportions_of_the_classes(counts: list[int], samples: int) -> None:
    labels = allocate_labels(counts, samples)
    assert labels.shape == (samples,)
    found = np.bincount(labels, minlength=len(counts))
    exact = np.array(counts) / sum(counts) * samples
    assert (np.abs(found - exact) < 1).all()
    assert (found[np.array(counts) == 0] == 0).all()
    assert np.array_equal(labels, allocate_labels(counts, samples))


def test_labels_are_shuffled() -> None:
    labels = allocate_labels([100] * 5, 200)
    assert set(labels[:40].tolist()) == set(range(5))


@pytest.mark.parametrize("counts", [[], [17]])
def test_without_classes_labels_are_zero(counts: list[int]) -> None:
    assert allocate_labels(counts, 5).tolist() == [0] * 5


def test_chunks_are_functions_of_seed_and_number(toy) -> None:
    system, labels = toy(), allocate_labels([1, 1, 1], 80)
    with sampling_mode(system):
        chunk = [draw_chunk(system, labels, c, seed=0, truncation=None, device="cpu") for c in (0, 1, 2, 1)]
        other = draw_chunk(system, labels, 1, seed=1, truncation=None, device="cpu")
    assert [len(c) for c in chunk] == [SAMPLE_CHUNK, SAMPLE_CHUNK, 80 - 2 * SAMPLE_CHUNK, SAMPLE_CHUNK]
    assert torch.equal(chunk[1], chunk[3])
    assert not torch.equal(chunk[0], chunk[1])
    assert not torch.equal(chunk[1], other)


def test_uint8_inverts_the_scaling_of_the_data_and_clamps() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.003, -0.005])).tolist() == [0, 255, 128, 127]


def test_sampling_mode_restores_each_modules_mode(toy) -> None:
    system = toy()
    system.painter.train()
    system.painter.norm.eval()
    with sampling_mode(system):
        assert not any(m.training for m in system.painter.modules())
    assert system.painter.training
    assert not system.painter.norm.training


def test_standing_statistics_are_the_same_everywhere_and_leave_no_graph(toy) -> None:
    first, second = toy(), toy()
    for system in (first, second):
        prepare(system, [30, 60, 10], seed=4, truncation=None, device="cpu")
    assert first.painter.standing == second.painter.standing != 0
    assert not first.painter.standing.is_inference()
    assert not first.painter.standing.requires_grad
