"""What nodes say of themselves, and what follows from it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bessemer.errors import MachineError
from bessemer.orchestration.nodes import Answer, _answer, check_nccl_interfaces, gloo_address, judge

VERSIONS = {"python": "3.11.9", "torch": "2.13.0"}
GOOD = Answer(host="a", time=100.0, versions=VERSIONS, missing=(), unwritable=None, address="10.0.0.1")


def judged(*answers: Answer) -> list[str]:
    return judge(list(answers), Path("/runs/r"), ".nonce", (99.0, 101.0))


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
            {"address": "127.0.1.1"},
            r"loopback one, where other nodes do not reach it, on b; set GLOO_SOCKET_IFNAME",
        ),
        ({"address": "::1"}, r"loopback one, where other nodes do not reach it, on b; set GLOO_SOCKET_IFNAME"),
        ({"address": "", "wrong": ("GLOO_SOCKET_IFNAME: ib0 is none",)}, r"^GLOO_SOCKET_IFNAME: ib0 is none on b; set"),
    ],
)
def test_what_is_wrong_is_named_with_the_node(other: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        judged(GOOD, replace(GOOD, host="b", **other))  # type: ignore[arg-type]


def test_loopback_is_fine_alone() -> None:
    alone = replace(GOOD, address="127.0.1.1")
    assert judged(alone) == []
    assert judged(alone, alone) == [], "several nodes on one machine"


ASK_GLOO = """
import os, psutil
import torch.distributed as dist
for name in (None, *os.environ["NAMES"].split(",")):
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    except RuntimeError:
        print("none")
        continue
    print(*(c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN))
    dist.destroy_process_group()
"""


def test_gloo_listens_where_we_think(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against gloo itself: by the machine's own name, on each of its interfaces, and on one that it has not."""
    there = psutil.net_if_addrs()
    names = [name for name, each in there.items() if any(a.family == socket.AF_INET for a in each)]
    env = {**os.environ, "NAMES": ",".join([*names, "no0"])}
    env.pop("GLOO_SOCKET_IFNAME", None)
    command = [sys.executable, "-c", ASK_GLOO]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    by_name, *on_interfaces, none = done.stdout.splitlines()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert gloo_address() == by_name, done.stderr
    for name, address in zip(names, on_interfaces, strict=True):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        assert gloo_address() == address
    assert none == "none"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    with pytest.raises(MachineError, match=r"^GLOO_SOCKET_IFNAME: no0 is no network interface .*there are .*lo"):
        gloo_address()


@pytest.mark.parametrize(
    ("setting", "fits"),
    [
        ("", True), ("eth", True), ("eth1,ib", True), ("=ib0", True), ("^lo", True), ("^=lo,eth0", True),
        ("ens", False), ("=ib", False), ("^lo,eth,ib", False), ("^=lo,eth0,ib0", False),
    ],
)  # fmt: skip
def test_nccl_must_have_an_interface_left(monkeypatch: pytest.MonkeyPatch, setting: str, fits: bool) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth0": [], "ib0": []})
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", setting)
    with contextlib.nullcontext() if fits else pytest.raises(MachineError, match=r"no network interface; .*eth0, ib0"):
        check_nccl_interfaces()


def test_a_cluster_without_tokens_is_noted() -> None:
    (note,) = judged(GOOD, replace(GOOD, host="b", asks_for_token=False))
    assert note == "who reaches the Ray of b can run any program there: RAY_AUTH_MODE=token is not set"


def test_clocks_that_are_off_are_noted() -> None:
    late, early = replace(GOOD, host="b", time=60.0), replace(GOOD, host="c", time=131.0)
    assert [note.partition(";")[0] for note in judged(GOOD, late, early)] == [
        "the clock of node b is off by 39 s or more",
        "the clock of node c is off by 30 s or more",
    ]


def test_the_one_clock_that_is_off_is_noted_though_it_be_ours() -> None:
    others = [replace(GOOD, host=host, time=1000.0) for host in "abc"]
    (note,) = judged(*others)
    assert note.startswith(f"the clock of node {socket.gethostname()} is off by 899 s or more")
    (note,) = judged(others[0])
    assert note.startswith("the clock of node a is off"), "of two, that of the driver is right"
    (note,) = judged(*others)
    here = replace(GOOD, host=socket.gethostname())  # this process sits on one of the nodes
    assert judged(here, *others) == [note]


def test_a_node_looks_at_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / ".nonce").touch()
    (tmp_path / "data").mkdir()
    answer = _answer(str(tmp_path), ".nonce", (str(tmp_path / "data"), str(tmp_path / "gone")))
    assert answer.missing == (str(tmp_path / "gone"),)
    assert answer.unwritable is None
    assert answer.versions["torch"].startswith("2.")
    assert answer.asks_for_token
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert not _answer(str(tmp_path), ".nonce", ()).asks_for_token
    assert _answer(str(tmp_path / "else"), ".nonce", ()).missing == (f"{tmp_path}/else/.nonce",)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".nonce", "data"]
