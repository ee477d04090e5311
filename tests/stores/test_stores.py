"""What every store can do: local, S3 and fsspec's do the same."""

from __future__ import annotations

import io
import pickle
import socket
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from tests.servers import Fault, FaultServer, S3Server

from bessemer.errors import MachineError, StoreError
from bessemer.files import file_sha256
from bessemer.stores.local import LocalStore
from bessemer.stores.opening import is_remote, open_store
from bessemer.stores.store import MissingObjectError, Patience, Store

QUICK = Patience(attempts=2, pause=0.001, longest_pause=0.01, timeout=5)


@pytest.fixture(params=["path", "file", "s3", "memory", "fsspec-local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    match request.param:
        case "path":
            return open_store(tmp_path / "store", QUICK)
        case "file":
            return open_store(f"file://{tmp_path}/with%20space", QUICK)
        case "s3":
            server: S3Server = request.getfixturevalue("s3")
            return open_store(f"{server.url}/some/prefix/", QUICK)
        case "memory":
            return open_store(f"memory://{uuid.uuid4().hex}", QUICK)
    return open_store(f"local://{tmp_path}/other", QUICK)  # a scheme that fsspec alone knows, and which is no store


def test_objects_come_back(store: Store, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "nothing").write_bytes(b"")
    assert store.list() == {}
    assert not store.exists("a/b c.tar")
    store.put("a/b c.tar", tmp_path / "source")
    store.put("a/empty", tmp_path / "nothing")
    store.put("ab", tmp_path / "source")
    assert store.exists("a/b c.tar")
    assert not store.exists("a")
    assert store.size("a/b c.tar") == 10_000
    assert store.read("a/b c.tar") == data
    assert store.read("a/b c.tar", 9_990) == data[9_990:]
    assert store.read("a/b c.tar", 10, 20) == data[10:30]
    assert store.read("a/empty") == store.read("ab", 10_000) == b""
    assert store.size("a/empty") == 0
    file = io.BytesIO()
    store.download("ab", file, size=10_000)
    assert file.getvalue() == data
    assert list(store.list().items()) == [("a/b c.tar", 10_000), ("a/empty", 0), ("ab", 10_000)]
    assert store.list("a/") == {"a/b c.tar": 10_000, "a/empty": 0}
    assert pickle.loads(pickle.dumps(store)).read("ab") == data
    (tmp_path / "source").write_bytes(b"new")
    store.put("ab", tmp_path / "source")
    assert store.read("ab") == b"new"
    store.delete("ab")
    store.delete("ab")
    store.delete("a/empty")
    assert store.list() == {"a/b c.tar": 10_000}


def test_what_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    store.put("x", tmp_path / "source")
    for action in (lambda: store.read("no/such"), lambda: store.size("no/such")):
        with pytest.raises(MissingObjectError, match="no/such: there is no such object"):
            action()
    with pytest.raises(StoreError, match=r"/x: has 5 bytes, .*were asked for"):
        store.read("x", 3, 3)
    with pytest.raises(StoreError, match=r"/x: has 5 bytes, .*were asked for"):
        store.read("x", 6)
    with pytest.raises(StoreError, match=r"/x: has 5 bytes, expected 4"):
        store.download("x", io.BytesIO(), size=4)
    with pytest.raises(FileNotFoundError):
        store.put("y", tmp_path / "missing")
    assert not store.exists("y")
    for name in ("../x", "/x", ""):
        with pytest.raises(StoreError, match="no relative path"):
            store.put(name, tmp_path / "source")


def test_threads_share_a_store(store: Store, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "source").write_bytes(data)
    store.put("x", tmp_path / "source")
    fresh: Store = pickle.loads(pickle.dumps(store))  # all threads make the first connection
    wrong: list[int] = []
    gate = threading.Barrier(6)

    def read(start: int) -> None:
        gate.wait()
        if fresh.read("x", start, 1000) != data[start : start + 1000]:
            wrong.append(start)

    threads = [threading.Thread(target=read, args=(i * 5000,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_cannot_be_stored_leaves_what_was_there(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    (tmp_path / "source").write_bytes(b"1")
    store.put("a", tmp_path / "source")
    (tmp_path / "store" / "d").mkdir()
    with pytest.raises(StoreError, match=r"store/d: cannot be written \(Is a directory\)"):
        store.put("d", tmp_path / "source")
    with pytest.raises(StoreError, match=r"store/a/b: cannot be written \((Not a directory|File exists)\)"):
        store.put("a/b", tmp_path / "source")
    assert store.list() == {"a": 1}
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["a", "d"]


def test_large_objects_go_to_s3_in_parts_and_read_back_in_ranges(s3: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(9 << 20))  # boto3 begins with parts at 8 MiB
    store = open_store(s3.url, QUICK)
    store.put("large", path)
    assert s3.client().head_object(Bucket=s3.bucket, Key="large")["ETag"].endswith('-2"')
    with (tmp_path / "back").open("wb") as file:
        store.download("large", file, size=9 << 20)
    assert file_sha256(tmp_path / "back") == file_sha256(path)
    assert store.read("large", (8 << 20) - 5, 10) == path.read_bytes()[(8 << 20) - 5 :][:10]


@pytest.mark.parametrize("kind", ["drop", "reset"])
def test_s3_survives_what_http_does(faulty: FaultServer, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """boto3 reads from a server that breaks off; moto never does."""
    for name, value in {"ENDPOINT_URL": faulty.url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    data = np.random.default_rng(0).bytes(1_000_000)
    faulty.objects = {"bucket/prefix/x": data}
    store = open_store("s3://bucket/prefix", QUICK)
    faulty.faults["bucket/prefix/x"] = [Fault(kind, 400_000), Fault(kind, 300_000)]
    assert store.read("x") == data
    assert len(faulty.requests) == 3
    assert faulty.requests[1][2] != "bytes=0-"  # what had come was not asked for again
    faulty.faults["bucket/prefix/x"] = [Fault(kind, 400_000), Fault("replace", data=bytes(1_000_000))]
    with pytest.raises(StoreError, match="x: changed while it was read"):
        store.read("x")
    faulty.faults["bucket/prefix/x"] = [Fault(kind, 0)] * 9
    with pytest.raises(StoreError, match="gave up at byte 0"):
        store.read("x")


def test_s3_says_what_is_wrong(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"s3://nowhere/x: .*\(NoSuchBucket\); create the bucket"):
        open_store("s3://nowhere", QUICK).put("x", tmp_path / "x")
    with pytest.raises(StoreError, match="NoSuchBucket"):
        open_store("s3://nowhere", QUICK).list()
    with pytest.raises(StoreError, match="write s3://BUCKET/PREFIX"):
        open_store("s3://")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreError, match=r"no credentials for S3 .*set AWS_ACCESS_KEY_ID"):
        open_store(s3.url, QUICK).read("x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s.getsockname()[1]}")
    with pytest.raises(StoreError, match=r"x: no connection .*check AWS_ENDPOINT_URL"):
        open_store(s3.url, QUICK).read("x")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("pipe:cat x", StoreError, "runs a shell command"),
        ("data:x", StoreError, "write data://..., or ./data:x for a path"),
        ("file://elsewhere/x", StoreError, "no file of this machine"),
        ("http:///x", StoreError, "names no host"),
        ("nonsense://x", StoreError, "nonsense"),
    ],
)
def test_urls_that_are_none(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_store(url, QUICK).read("x")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_package_that_is_not_here_is_named(scheme: str) -> None:
    package = {"gs": "gcsfs", "az": "adlfs"}[scheme]
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(MachineError, match=f"pip install {package}"):
            open_store(f"{scheme}://bucket/x").read("a")
    else:
        pytest.skip(f"{package} is installed")


def test_which_urls_lead_elsewhere(tmp_path: Path) -> None:
    assert [is_remote(u) for u in ("/a:b", "a/b", "file:///a", "s3://a", "https://a", tmp_path)] == [
        False,
        False,
        False,
        True,
        True,
        False,
    ]
    assert isinstance(open_store("relative/path"), LocalStore)
