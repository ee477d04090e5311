"""A single bit that differs between two workers is found before it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bessemer.tracking.journal import read_journal
from bessemer.training import agreement
from bessemer.training.agreement import fingerprint, network_fingerprint
from bessemer.training.checkpoint_files import kimg_name


def by_hand(tensor: Tensor) -> int:
    bits = tensor.contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    total = sum((2 * i + 1) * b for i, b in enumerate(bits.tolist())) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_the_sum_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(agreement, "_CHUNK", chunk)
    tensor = (torch.randn(4, 5, generator=torch.Generator().manual_seed(1)) * 1000).to(dtype)
    assert int(fingerprint(tensor)) == by_hand(tensor)
    assert int(fingerprint(tensor.t())) == by_hand(tensor.t())


@given(element=st.integers(0, 19), bit=st.integers(0, 31))
def test_every_bit_counts(element: int, bit: int) -> None:
    tensor = torch.randn(20, generator=torch.Generator().manual_seed(2))
    before = int(fingerprint(tensor))
    bits = tensor.view(torch.int32)
    bits[element] ^= -(2**31) if bit == 31 else 1 << bit
    assert int(fingerprint(tensor)) != before


def test_order_and_names_count() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])
    assert fingerprint(a) != fingerprint(b)
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        one.weight.fill_(2)
        other.bias.fill_(2)
        assert network_fingerprint(one) != network_fingerprint(other)
        other.weight.fill_(2)
        other.bias.fill_(0)
    assert network_fingerprint(one) == network_fingerprint(other)
    other.running_mean[1] += 1  # buffers count
    assert network_fingerprint(one) != network_fingerprint(other)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "stage"), [("discriminator.2.weight", 0), ("generator.1.mean", 2)])
def test_a_flipped_bit_stops_the_run_before_the_checkpoint(
    launch: Callable[..., list[dict[str, Tensor]]], tmp_path: Path, tensor: str, stage: int
) -> None:
    run = tmp_path / "run"
    # In the last iteration before the checkpoint, so that what was flipped has not spread through everything.
    words = ["--run", run, "--flip", tensor, "--from", 224]
    launch(2, stage, 10, *words, script="guarded_run.py")
    (failed,) = [r for r in read_journal(run / "journal.jsonl") if r.get("event") == "failed"]
    network = tensor.split(".")[0]
    assert f"tensors of {network} differ" in failed["error"] or f"{tensor} differs" in failed["error"]
    assert "between workers 0 and 1 at 0.256 kimg, so no checkpoint was written" in failed["error"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [kimg_name(128)]
