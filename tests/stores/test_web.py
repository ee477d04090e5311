"""Objects come whole and right over connections that break off in every way, or there is an error."""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.servers import Fault, FaultServer

from bessemer.errors import StoreError
from bessemer.stores.opening import open_store
from bessemer.stores.store import MissingObjectError, Patience, Store

DATA = np.random.default_rng(1).bytes(300_000)
QUICK = Patience(attempts=4, pause=0.001, longest_pause=0.01, timeout=10)
NAME = "train/a b#1.tar"


@pytest.fixture
def store(faulty: FaultServer) -> Store:
    faulty.objects = {NAME: DATA, "empty": b""}
    return open_store(faulty.url, QUICK)


def whole(store: Store, name: str = NAME, size: int | None = None) -> bytes:
    file = io.BytesIO(b"before")
    file.seek(6)
    store.download(name, file, size=size)
    assert file.getvalue()[:6] == b"before"
    return file.getvalue()[6:]


def test_sizes_and_ranges(store: Store) -> None:
    assert store.size(NAME) == len(DATA)
    assert store.size("empty") == 0
    assert whole(store) == DATA
    assert store.read("empty") == whole(store, "empty", 0) == b""
    assert store.read(NAME) == DATA
    assert store.read(NAME, 1000, 10) == DATA[1000:1010]
    assert store.read(NAME, 299_990) == DATA[299_990:]
    assert store.read(NAME, 300_000) == b""
    assert store.read(NAME, 5, 0) == b""
    assert store.exists(NAME)
    assert not store.exists("other")


@pytest.mark.parametrize("body", ["length", "chunked", "close"])
@pytest.mark.parametrize("kind", ["drop", "reset"])
@pytest.mark.parametrize("cut", [0, 1, 512, 262_144, 299_999])
def test_a_dropped_connection_costs_a_request(
    store: Store, faulty: FaultServer, body: str, kind: str, cut: int
) -> None:
    faulty.body = body
    faulty.faults[NAME] = [Fault(kind, cut), Fault(kind, 7), Fault(kind, 0)]
    assert whole(store, size=len(DATA)) == DATA
    if kind == "drop":  # what had come was not asked for again; a reset may take bytes back
        assert faulty.requests[1][2] == f"bytes={cut}-"
        assert len(faulty.requests) == (4 if cut + 7 < len(DATA) else 2)
    faulty.faults[NAME] = [Fault(kind, min(cut, 99))]
    assert store.read(NAME, 50_000, 100) == DATA[50_000:50_100]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.sampled_from(["length", "chunked", "close"]),
    st.sampled_from(["etag", "weak", "date", "none"]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["drop", "reset", "503", "429"]), st.integers(0, 300_000)), max_size=3),
    st.integers(0, 300_000),
    st.integers(0, 300_000),
)
def test_whatever_happens_the_bytes_are_right(
    store: Store,
    faulty: FaultServer,
    body: str,
    versions: str,
    ranges: bool,
    faults: list[tuple[str, int]],
    start: int,
    length: int,
) -> None:
    faulty.body, faulty.versions, faulty.ranges = body, versions, ranges
    faulty.faults[NAME] = [Fault(kind, at) for kind, at in faults]
    length = min(length, len(DATA) - start)
    assert store.read(NAME, start, length) == DATA[start : start + length]
    faulty.faults[NAME] = [Fault(kind, at) for kind, at in faults]
    assert whole(store, size=len(DATA)) == DATA


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("versions", ["etag", "weak", "date"])
def test_an_object_that_changes_is_an_error_and_no_mixture(
    store: Store, faulty: FaultServer, versions: str, ranges: bool
) -> None:
    faulty.versions, faulty.ranges = versions, ranges
    other = bytes(reversed(DATA))
    faulty.faults[NAME] = [Fault("drop", 1000), Fault("replace", data=other)]
    with pytest.raises(StoreError, match=r"a b#1.tar: changed while it was read \(at byte 1000\)"):
        whole(store)
    assert whole(store) == other


def test_without_versions_reading_starts_over(store: Store, faulty: FaultServer) -> None:
    faulty.versions = "none"
    other = bytes(reversed(DATA))
    faulty.faults[NAME] = [Fault("drop", 1000), Fault("replace", data=other)]
    assert whole(store) == other


@pytest.mark.parametrize("status", ["429", "500", "503"])
def test_a_busy_server_is_asked_again(store: Store, faulty: FaultServer, status: str) -> None:
    faulty.faults[NAME] = [Fault(status, header=("Retry-After", "0")), Fault(status), Fault("drop", 5), Fault(status)]
    assert whole(store) == DATA
    assert faulty.answers(NAME) == [int(status), int(status), 206, int(status), 206]


def test_patience_ends(store: Store, faulty: FaultServer) -> None:
    faulty.faults[NAME] = [Fault("drop", 1000), *[Fault("503")] * 9]
    with pytest.raises(StoreError, match=r"gave up at byte 1000 after 4 attempts in a row: the server says 503"):
        store.read(NAME)
    assert len(faulty.requests) == 4  # the drop counts: nothing came after it
    faulty.versions = "none"  # reading starts over each time and gets no farther: that is no progress
    faulty.requests.clear()
    faulty.faults[NAME] = [Fault("drop", 1000)] * 9
    with pytest.raises(StoreError, match="gave up"):
        store.read(NAME)
    assert len(faulty.requests) == 4


def test_a_server_that_falls_silent_counts_as_dropped(faulty: FaultServer) -> None:
    faulty.objects = {NAME: DATA}
    store = open_store(faulty.url, replace(QUICK, timeout=0.5))
    faulty.faults[NAME] = [Fault("stall", 1000)]
    assert whole(store) == DATA
    assert faulty.requests[-1][2] == "bytes=1000-"


def test_an_object_of_another_size_is_refused(store: Store, faulty: FaultServer) -> None:
    for body in ("length", "chunked", "close"):
        faulty.body = body
        for size in (len(DATA) - 1, len(DATA) + 1):
            with pytest.raises(StoreError, match=f"has 300000 bytes, expected {size}; it was replaced or cut"):
                whole(store, size=size)
    faulty.body = "length"
    with pytest.raises(StoreError, match="has 300000 bytes, bytes 299999 to 300001 were asked for"):
        store.read(NAME, 299_999, 2)
    with pytest.raises(StoreError, match="has 300000 bytes, bytes 300001 to the end were asked for"):
        store.read(NAME, 300_001)


def test_an_end_that_cannot_be_told_is_an_error(store: Store, faulty: FaultServer) -> None:
    faulty.ranges, faulty.body = False, "close"
    with pytest.raises(StoreError, match="says neither how long it is nor where it ends"):
        whole(store)
    assert whole(store, size=len(DATA)) == DATA
    faulty.body = "chunked"
    assert whole(store) == DATA


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("404", "there is no such object"),
        ("403", "403 Forbidden; check the signature, user or password"),
        ("418", "the server says 418"),
    ],
)
def test_what_is_final_is_not_tried_again(store: Store, faulty: FaultServer, status: str, message: str) -> None:
    faulty.faults[NAME] = [Fault(status)]
    with pytest.raises(StoreError, match=message) as caught:
        store.read(NAME)
    assert faulty.answers(NAME) == [int(status)]
    assert isinstance(caught.value, MissingObjectError) == (status == "404")
    assert str(caught.value).startswith(f"{faulty.url}/{NAME}: ")


def test_nobody_listens() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    store = open_store(f"http://127.0.0.1:{port}/x", QUICK)
    with pytest.raises(StoreError, match=r"gave up at byte 0 after 4 attempts in a row: connection refused; check"):
        store.read("a")


def test_redirects_are_followed_with_the_range(store: Store, faulty: FaultServer) -> None:
    faulty.faults["old"] = [Fault("302", header=("Location", f"{faulty.url}/train/a%20b%231.tar"))]
    assert store.read("old", 10, 5) == DATA[10:15]
    faulty.faults["loop"] = [Fault("302", header=("Location", f"{faulty.url}/loop"))] * 20
    with pytest.raises(StoreError, match="more than 5 redirects"):
        store.read("loop")


def test_signatures_and_passwords_are_sent_and_not_shown(store: Store, faulty: FaultServer) -> None:
    secret = open_store(f"http://me:pa%40ss@{faulty.url[7:]}/train?signature=abc", QUICK)
    assert secret.read("a b#1.tar", 0, 3) == DATA[:3]
    assert faulty.headers[-1]["authorization"] == "Basic bWU6cGFAc3M="
    with pytest.raises(StoreError) as caught:
        secret.read("other")
    assert str(caught.value).startswith(f"{faulty.url}/train/other: ")
    assert "abc" not in repr(secret)


def test_nothing_is_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for action in (
        lambda: store.put("a", tmp_path / "file"),
        lambda: store.delete("a"),
        lambda: store.list(),
    ):
        with pytest.raises(StoreError, match=r"only be read|cannot be asked"):
            action()


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "a/../../b", "", "a\0"])
def test_a_name_stays_in_its_store(store: Store, faulty: FaultServer, name: str) -> None:
    with pytest.raises(StoreError, match="no relative path below"):
        store.read(name)
    assert not faulty.requests


def test_threads_share_a_store_and_processes_get_their_own(store: Store, faulty: FaultServer) -> None:
    faulty.faults[NAME] = [Fault("drop", 1000)] * 10
    with ThreadPoolExecutor(8) as pool:
        digests = {hashlib.sha256(data).hexdigest() for data in pool.map(lambda _: store.read(NAME), range(24))}
    assert digests == {hashlib.sha256(DATA).hexdigest()}
    assert pickle.loads(pickle.dumps(store)).read(NAME) == DATA
