"""Asks every node of a cluster, before a run starts, whether it could take a worker: disk, versions, clock, address."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import socket
import statistics
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from bessemer.errors import MachineError
from bessemer.spec.job import JobSpec
from bessemer.stores.opening import is_remote

__all__ = ["Answer", "check_nccl_interfaces", "check_nodes", "gloo_address", "judge"]

_SECONDS = 60.0
_SKEW_SECONDS = 5.0
_PACKAGES = ("torch", "deepspeed", "ray", "numpy")


@dataclass(frozen=True)
class Answer:
    """What a node says of itself."""

    host: str
    time: float
    """Unix seconds, by its own clock."""
    versions: Mapping[str, str]
    missing: tuple[str, ...]
    """Paths, of those asked about, that are not there."""
    unwritable: str | None
    """Why the run directory cannot be written."""
    address: str
    """Where gloo makes workers listen."""
    wrong: tuple[str, ...] = ()
    """What is set there and cannot be."""
    asks_for_token: bool = True
    """Whether its Ray takes orders only from those who have the cluster's token."""


def _answer(run: str, nonce: str, paths: tuple[str, ...]) -> Answer:
    """What Ray runs on every node."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    missing = tuple(path for path in (f"{run}/{nonce}", *paths) if not Path(path).exists())
    unwritable = None
    if not missing:
        try:
            mine = Path(run) / f"{nonce}-{uuid.uuid4().hex}"
            mine.touch()
            mine.unlink()
        except OSError as e:
            unwritable = str(e.strerror)
    address, wrong = "", []
    try:
        address = gloo_address()
    except MachineError as e:
        wrong.append(str(e))
    try:
        check_nccl_interfaces()
    except MachineError as e:
        wrong.append(str(e))
    return Answer(
        socket.gethostname(),
        time.time(),
        versions,
        missing,
        unwritable,
        address,
        tuple(wrong),
        asks_for_token=os.environ.get("RAY_AUTH_MODE") == "token",
    )


def gloo_address() -> str:
    """Where gloo makes a worker of this machine listen, which it does also beside NCCL.

    That is an address of the interface in GLOO_SOCKET_IFNAME; without, the first one that the machine's own name stands
    for and that it has; without such a one, loopback.

    Raises:
        MachineError: there is no such interface, or it has no address.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if name:
        there = psutil.net_if_addrs()
        found = [each.address for each in there.get(name, ()) if each.family in (socket.AF_INET, socket.AF_INET6)]
        if not found:
            raise MachineError(
                f"GLOO_SOCKET_IFNAME: {name} is no network interface with an address; there are "
                f"{', '.join(sorted(there))}"
            )
        return str(found[0].partition("%")[0])
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, where in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.bind(where)
                return str(where[0])
    return "127.0.0.1"


def check_nccl_interfaces() -> None:
    """Check that NCCL_SOCKET_IFNAME, if it is set, leaves NCCL an interface of this machine.

    It is a list of beginnings of names; a leading `=` makes them whole names, a leading `^` those to leave out (NCCL's
    user guide, environment variables).

    Raises:
        MachineError: it leaves none.
    """
    text = os.environ.get("NCCL_SOCKET_IFNAME", "")
    without, exact = text.startswith("^"), text.lstrip("^").startswith("=")
    names = [name for name in text.lstrip("^=").split(",") if name]
    there = sorted(psutil.net_if_addrs())

    def is_named(interface: str) -> bool:
        return interface in names if exact else interface.startswith(tuple(names))

    if names and all(is_named(interface) is without for interface in there):
        raise MachineError(f"NCCL_SOCKET_IFNAME: {text} leaves NCCL no network interface; there are {', '.join(there)}")


def check_nodes(run: Path, job: JobSpec) -> list[str]:
    """Ask every node that could hold a worker. This process has joined the cluster.

    Returns:
        What a person should know, although the run can start.

    Raises:
        MachineError: names the nodes, what is wrong there, and the fix.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    needs = {"CPU": job.resources.cpus_per_worker, "GPU": job.resources.gpus_per_worker}
    nodes = [
        node
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and all(node["Resources"].get(kind, 0.0) >= need for kind, need in needs.items() if need)
    ]
    nonce = f".probe-{uuid.uuid4().hex}"
    local = (job.data.path, job.evaluation.held_out)
    paths = tuple(path for path in local if path is not None and not is_remote(path))
    (run / nonce).touch()
    try:
        asked = {
            ray.remote(num_cpus=0, max_retries=0)(_answer)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(str(run), nonce, paths): node["NodeManagerHostname"]
            for node in nodes
        }
        began = time.time()
        done, silent = ray.wait(list(asked), num_returns=max(1, len(asked)), timeout=_SECONDS) if asked else ([], [])
        ended = time.time()
        answers, notes = [], []
        for future in done:
            try:
                answers.append(ray.get(future))
            except Exception as e:
                silent.append(future)
                notes.append(f"node {asked[future]} failed to answer: {type(e).__name__}")
        notes += [f"node {asked[future]} did not answer in {_SECONDS:g} s" for future in silent if future not in done]
    finally:
        (run / nonce).unlink()
    return notes + judge(answers, run, nonce, (began, ended))


def judge(answers: list[Answer], run: Path, nonce: str, asked: tuple[float, float]) -> list[str]:
    """What the nodes' answers mean.

    Args:
        answers: of the nodes.
        run: the run directory.
        nonce: the file in it that all nodes must see.
        asked: between when and when, by our clock, they answered.

    Returns:
        Notes.

    Raises:
        MachineError: the run cannot start there.
    """
    wrong: list[str] = []

    def complain(what: str, hosts: list[str], fix: str) -> None:
        if hosts:
            wrong.append(f"{what} on {', '.join(sorted(hosts))}; {fix}")

    blind = [a.host for a in answers if f"{run}/{nonce}" in a.missing]
    complain(
        f"run directory {run}: is not the same", blind, "put --runs on storage that all nodes mount at the same path."
    )
    for path in sorted({path for a in answers for path in a.missing} - {f"{run}/{nonce}"}):
        hosts = [a.host for a in answers if path in a.missing and a.host not in blind]
        complain(f"data {path}: is not there", hosts, "put it where all nodes see it, or into an object store.")
    for reason in sorted({a.unwritable for a in answers if a.unwritable}):
        hosts = [a.host for a in answers if a.unwritable == reason]
        complain(f"run directory {run}: cannot be written ({reason})", hosts, "make it writable for Ray's user there.")
    for package in sorted({package for a in answers for package in a.versions}):
        by_version: dict[str, list[str]] = {}
        for a in answers:
            by_version.setdefault(a.versions[package], []).append(a.host)
        if len(by_version) > 1:
            shown = ", ".join(f"{v} on {' and '.join(sorted(hosts))}" for v, hosts in sorted(by_version.items()))
            wrong.append(f"{package}: nodes have different versions, {shown}; use one image for all nodes.")
    for reason in sorted({reason for a in answers for reason in a.wrong}):
        complain(reason, [a.host for a in answers if reason in a.wrong], "set it right before `ray start`.")
    if len({a.host for a in answers}) > 1:  # nodes of one name share a machine, and its loopback
        complain(
            "host name: stands for no address, or for a loopback one, where other nodes do not reach it,",
            [a.host for a in answers if a.address and ipaddress.ip_address(a.address).is_loopback],
            "set GLOO_SOCKET_IFNAME to the network interface on all nodes, or mend /etc/hosts.",
        )
    if wrong:
        raise MachineError("\n".join(wrong))
    open_to_all = sorted(a.host for a in answers if not a.asks_for_token)
    notes = [
        f"who reaches the Ray of {', '.join(open_to_all)} can run any program there: RAY_AUTH_MODE=token is not set"
    ] * bool(open_to_all)
    return notes + [
        f"the clock of node {host} is off by {skew:.0f} s or more; times in the journal will be, too (nothing else)"
        for host, skew in sorted(_skews(answers, asked).items())
        if skew > _SKEW_SECONDS
    ]


def _skews(answers: list[Answer], asked: tuple[float, float]) -> dict[str, float]:
    """Host -> by how many seconds at least its clock differs from the median, this process's among them."""
    middle, slack = sum(asked) / 2, (asked[1] - asked[0]) / 2
    ahead = {socket.gethostname(): 0.0, **{a.host: a.time - middle for a in answers}}
    middles = statistics.median_low(ahead.values()), statistics.median_high(ahead.values())
    usual = min(middles, key=abs)  # of two clocks, ours is right
    return {host: abs(each - usual) - slack for host, each in ahead.items()}
