"""What nodes say of themselves, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bessemer.errors import MachineError
from bessemer.orchestration.nodes import Answer, _answer, judge

VERSIONS = {"python": "3.11.9", "torch": "2.13.0"}
GOOD = Answer(host="a", time=100.0, versions=VERSIONS, missing=(), unwritable=None, loopback=None)


def judged(*answers: Answer, gloo: bool = True) -> list[str]:
    return judge(list(answers), Path("/runs/r"), ".nonce", (99.0, 101.0), gloo=gloo)


def test_good_nodes_have_nothing_to_say() -> None:
    assert judged() == []
    assert judged(GOOD, replace(GOOD, host="b", time=102.0)) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"missing": ("/runs/r/.nonce",)}, r"^run directory /runs/r: is not the same on b; put --runs on storage"),
        ({"missing": ("/data/x",)}, r"^data /data/x: is not there on b; put it where all nodes see it"),
        ({"unwritable": "No space left on device"}, r"cannot be written \(No space left on device\) on b"),
        (
            {"versions": {**VERSIONS, "torch": "2.12.1"}},
            r"^torch: nodes have different versions, 2\.12\.1 on b, 2\.13\.0 on a; use one image",
        ),
        (
            {"loopback": "127.0.1.1"},
            r"loopback address, where other nodes do not reach it, on b; set GLOO_SOCKET_IFNAME",
        ),
    ],
)
def test_what_is_wrong_is_named_with_the_node(other: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        judged(GOOD, replace(GOOD, host="b", **other))  # type: ignore[arg-type]


def test_loopback_is_fine_alone_and_with_nccl() -> None:
    alone = replace(GOOD, loopback="127.0.1.1")
    assert judged(alone) == []
    assert judged(alone, alone) == [], "several nodes on one machine"
    assert judged(alone, replace(GOOD, host="b"), gloo=False) == []


def test_clocks_that_are_off_are_noted() -> None:
    late, early = replace(GOOD, host="b", time=60.0), replace(GOOD, host="c", time=131.0)
    assert [note.partition(";")[0] for note in judged(GOOD, late, early)] == [
        "the clock of node b is off by 39 s or more",
        "the clock of node c is off by 30 s or more",
    ]


def test_a_node_looks_at_its_own_disk(tmp_path: Path) -> None:
    (tmp_path / ".nonce").touch()
    (tmp_path / "data").mkdir()
    answer = _answer(str(tmp_path), ".nonce", (str(tmp_path / "data"), str(tmp_path / "gone")))
    assert answer.missing == (str(tmp_path / "gone"),)
    assert answer.unwritable is None
    assert answer.versions["torch"].startswith("2.")
    assert _answer(str(tmp_path / "else"), ".nonce", ()).missing == (f"{tmp_path}/else/.nonce",)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".nonce", "data"]
