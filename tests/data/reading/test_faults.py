"""Every way in which a shard can be damaged, at rest and on its way: no sample is lost, and none is silently wrong.

A sample is either read exactly, or refused with an error that names its shard. Three places: a directory, a web server,
and S3 (moto; where the connection itself breaks, a server that speaks as much of S3).
"""

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.servers import Fault, FaultServer, S3Server, fault_server, s3_server

from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.quarantine import Quarantine
from bessemer.data.reading.shard_cache import ShardCache
from bessemer.data.reading.stream import SliceStream
from bessemer.errors import DataError, StoreError
from bessemer.stores.opening import open_store
from bessemer.stores.store import Patience, Store

Truth = tuple[np.ndarray, np.ndarray]
PATIENCE = Patience(attempts=6, pause=0.001, longest_pause=0.01)
SHARD = "shard-000001.tar"
ALL = np.arange(60)


@cache
def store_at(url: str) -> Store:
    """One store for all tests: a client of S3 takes longer to make than these shards to read."""
    return open_store(url, PATIENCE)


@cache
def bucket_client(server: S3Server) -> Any:
    return server.client()


@dataclass
class Place:
    """A copy of the packed set that tests may damage."""

    kind: str
    url: str
    put: Callable[[str, bytes | None], None]
    """Replace a file; None removes it."""
    files: dict[str, bytes]
    cache: ShardCache
    ids: list[int] = field(default_factory=list)
    """Samples of `SHARD`."""

    def open(self, quarantine: Quarantine | None = None) -> ShardedDataset:
        store = None if self.kind == "file" else store_at(self.url)
        return ShardedDataset.open(self.url, cache=self.cache, store=store, quarantine=quarantine)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as found:
        yield found


@pytest.fixture(scope="module")
def web() -> Iterator[FaultServer]:
    with fault_server() as found:
        yield found


@pytest.fixture(params=["file", "http", "s3"])
def place(request: pytest.FixtureRequest, packed: Path, tmp_path: Path) -> Place:
    files = {path.name: path.read_bytes() for path in packed.iterdir()}
    copies = ShardCache(tmp_path / "cache", 10**9)
    kind: str = request.param
    if kind == "file":
        copy = Path(shutil.copytree(packed, tmp_path / "set"))

        def put(name: str, data: bytes | None) -> None:
            (copy / name).unlink() if data is None else (copy / name).write_bytes(data)

        url = str(copy)
    elif kind == "http":
        server: FaultServer = request.getfixturevalue("web")
        server.objects.clear()
        server.requests.clear()

        def put(name: str, data: bytes | None) -> None:
            if data is None:
                del server.objects[f"set/{name}"]
            else:
                server.objects[f"set/{name}"] = data

        url = f"{server.url}/set"
    else:
        bucket: S3Server = request.getfixturevalue("s3")
        client = bucket_client(bucket)

        def put(name: str, data: bytes | None) -> None:
            if data is None:
                client.delete_object(Bucket=bucket.bucket, Key=f"set/{name}")
            else:
                client.put_object(Bucket=bucket.bucket, Key=f"set/{name}", Body=data)

        url = f"{bucket.url}/set"
    if kind != "file":
        for name, data in files.items():
            put(name, data)
    found = Place(kind, url, put, files, copies)
    with found.open() as dataset:
        found.ids = np.flatnonzero(dataset.shards_of(ALL) == 1).tolist()
    for path in copies.directory.iterdir():
        path.unlink()
    return found


def members(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def cut_at_a_member(data: bytes) -> bytes:
    return data[: members(data)[-2].offset]


def cut_in_a_member(data: bytes) -> bytes:
    return data[: members(data)[-2].offset_data + 100]


def cut_in_a_header(data: bytes) -> bytes:
    return data[: members(data)[-2].offset + 200]


def image(data: bytes) -> tarfile.TarInfo:
    """A JPEG in the middle of the shard."""
    return [member for member in members(data) if member.name.endswith(".jpg")][2]


def replaced(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def flipped_header(data: bytes) -> bytes:
    start = image(data).offset
    return replaced(data, start + 5, bytes([data[start + 5] ^ 1]))


def zeroed_header(data: bytes) -> bytes:
    return replaced(data, image(data).offset, bytes(512))


def zeroed_block(data: bytes) -> bytes:
    return replaced(data, image(data).offset_data, bytes(512))


def zeroed_payload(data: bytes) -> bytes:
    return replaced(data, image(data).offset_data + image(data).size // 2, bytes(40))


def without_a_member(data: bytes) -> bytes:
    lost = image(data)
    stop = lost.offset_data + -(-lost.size // 512) * 512
    return data[: lost.offset] + data[stop:]


def without_a_member_padded(data: bytes) -> bytes:
    return without_a_member(data).ljust(len(data), b"\0")


FAULTS: list[Callable[[bytes], bytes | None]] = [
    cut_at_a_member,
    cut_in_a_member,
    cut_in_a_header,
    flipped_header,
    zeroed_header,
    zeroed_block,
    zeroed_payload,
    without_a_member,
    without_a_member_padded,
    lambda data: data + bytes(1024),
    lambda data: bytes(len(data)),
    lambda data: b"",
    lambda data: None,
]
NAMES = [fault.__name__ for fault in FAULTS[:-4]] + ["too_long", "all_zero", "empty", "missing"]
SAME_SIZE = {"flipped_header", "zeroed_header", "zeroed_block", "zeroed_payload", "without_a_member_padded", "all_zero"}


def refused(dataset: ShardedDataset, truth: Truth, ids: list[int] | None = None) -> list[int]:
    """Which of these samples (or all) are refused, by an error that names the shard; all others are exact."""
    found, messages = [], []
    for number in ALL.tolist() if ids is None else ids:
        try:
            pixels = dataset.read(np.array([number]))
        except (DataError, StoreError) as error:
            messages.append(str(error))
            found.append(number)
        else:
            assert np.array_equal(pixels[0], truth[0][number])
            assert dataset.labels[number] == truth[1][number]
    assert all(SHARD in message for message in messages)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_damage_at_rest(name: str, place: Place, truth: Truth) -> None:
    damaged = FAULTS[NAMES.index(name)](place.files[SHARD])
    assert damaged != place.files[SHARD]
    place.put(SHARD, damaged)
    if place.kind != "file":
        # Nothing of a shard that is not as it was packed is ever used.
        some = [place.ids[-1]]
        with place.open() as dataset:
            others = sorted(set(ALL.tolist()) - set(place.ids))
            assert refused(dataset, truth, some + others) == some
        place.put(SHARD, place.files[SHARD])
        with place.open() as dataset:
            assert refused(dataset, truth) == []
        return
    with pytest.raises(DataError, match=SHARD):
        ShardedDataset.open(place.url, verify="sha256")
    if name not in SAME_SIZE:
        with pytest.raises(DataError, match=SHARD):
            place.open()
        return
    with place.open() as dataset:
        wrong = refused(dataset, truth)
    assert set(wrong) <= set(place.ids)
    # Headers are not looked at: the index knows where the images lie.
    assert bool(wrong) == (name not in ("flipped_header", "zeroed_header"))
    if name in ("zeroed_block", "zeroed_payload"):
        assert len(wrong) == 1


@pytest.mark.parametrize("name", ["manifest.json", "index.npy"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing"])
def test_damaged_manifests_and_indices(name: str, damage: str, place: Place) -> None:
    data = place.files[name]
    middle = len(data) // 2 if name == "index.npy" else data.index(b'"samples"') - 12  # a digit, not the hash's
    flipped = replaced(data, middle, bytes([data[middle] ^ 1]))
    place.put(name, {"cut": data[:-30], "flipped": flipped, "empty": b"", "missing": None}[damage])
    with pytest.raises((DataError, StoreError), match=name.replace(".", r"\.")):
        place.open()
    place.put(name, data)
    assert len(place.open()) == 60


@pytest.mark.parametrize("place", ["http", "s3"], indirect=True)
@pytest.mark.parametrize("damage", ["flipped_header", "zeroed_block", "zeroed_payload", "cut_in_a_member"])
def test_a_copy_in_the_cache_that_went_bad_is_fetched_again(damage: str, place: Place, truth: Truth) -> None:
    with place.open() as dataset:
        assert refused(dataset, truth) == []
        copy = place.cache.path(dataset.manifest.shards[1])
        fault = FAULTS[NAMES.index(damage)]
        copy.write_bytes(fault(place.files[SHARD]) or b"")  # in place, under the reader's feet
        assert refused(dataset, truth) == []
    with place.open() as fresh:
        assert refused(fresh, truth) == []
    if damage != "flipped_header":
        assert copy.read_bytes() == place.files[SHARD]


# On the way: what breaks is the connection.

BROKEN = {
    "drop": [Fault("drop", at=at) for at in (0, 1, 512, 600)],
    "reset": [Fault("reset", at=at) for at in (0, 700, 300)],
    "503": [Fault("503"), Fault("503", header=("Retry-After", "0")), Fault("drop", at=100), Fault("503")],
}


@pytest.fixture(params=["http", "s3"])
def breaking(
    request: pytest.FixtureRequest,
    web: FaultServer,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[FaultServer, Place]]:
    files = {path.name: path.read_bytes() for path in packed.iterdir()}
    web.objects.clear()
    web.objects.update({f"bucket/set/{name}": data for name, data in files.items()})
    web.faults, web.body = {}, "length"
    web.requests.clear()
    for key, value in {
        "AWS_ENDPOINT_URL": web.url,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    url = f"{web.url}/bucket/set" if request.param == "http" else "s3://bucket/set"
    yield web, Place(request.param, url, lambda *_: None, files, ShardCache(tmp_path / "cache", 10**9))
    web.faults, web.body = {}, "length"


@pytest.mark.parametrize("kind", sorted(BROKEN))
@pytest.mark.parametrize("body", ["length", "chunked", "close"])
def test_broken_connections(kind: str, body: str, breaking: tuple[FaultServer, Place], truth: Truth) -> None:
    server, place = breaking
    server.body = body
    server.faults = {name: list(BROKEN[kind]) for name in server.objects}
    with place.open() as dataset:
        assert np.array_equal(dataset.read(ALL), truth[0])
        assert np.array_equal(dataset.labels, truth[1])
    assert not any(server.faults.values())  # all of them happened


def test_a_drop_exactly_between_two_members(breaking: tuple[FaultServer, Place], truth: Truth) -> None:
    server, place = breaking
    server.body = "close"
    ends = [member.offset for member in members(place.files[SHARD])][1:]
    server.faults[f"bucket/set/{SHARD}"] = [Fault("drop", at=at) for at in [*ends[:1], ends[3] - ends[0]]]
    with place.open() as dataset:
        assert np.array_equal(dataset.read(ALL), truth[0])


def test_a_shard_replaced_while_it_is_read(breaking: tuple[FaultServer, Place], truth: Truth) -> None:
    server, place = breaking
    data = place.files[SHARD]
    server.faults[f"bucket/set/{SHARD}"] = [Fault("drop", at=4000), Fault("replace", data=zeroed_payload(data))]
    with place.open() as dataset:
        ids = np.flatnonzero(dataset.shards_of(ALL) == 1).tolist()
        assert refused(dataset, truth, ids[:2]) == ids[:2]


def test_a_server_that_stays_away(breaking: tuple[FaultServer, Place], truth: Truth) -> None:
    server, place = breaking
    with place.open() as dataset:
        server.faults[f"bucket/set/{SHARD}"] = [Fault("503")] * 1000
        with pytest.raises(StoreError, match=rf"{SHARD}.*503"):
            dataset.read(ALL)
        server.faults.clear()
        assert np.array_equal(dataset.read(ALL), truth[0])


def test_quarantine_never_hides_a_store_that_fails(breaking: tuple[FaultServer, Place]) -> None:
    server, place = breaking
    quarantine = Quarantine(60)
    with place.open(quarantine) as dataset:
        del server.objects[f"bucket/set/{SHARD}"]
        with pytest.raises(StoreError, match=SHARD):
            dataset.read(ALL)
    assert len(quarantine) == 0


def test_streams_prefetch_in_the_order_of_need(breaking: tuple[FaultServer, Place], packed: Path) -> None:
    server, place = breaking
    settings = {"seed": 5, "batch_size": 16, "slice_size": 4, "slices": [0, 1, 2, 3], "mirror": True}
    with ShardedDataset.open(packed) as local, place.open() as remote:
        plain = SliceStream(local, threads=0, **settings)  # type: ignore[arg-type]
        stream = SliceStream(remote, threads=2, **settings)  # type: ignore[arg-type]
        try:
            for step in range(6):
                for ours, theirs in zip(stream.batch(16 * step), plain.batch(16 * step), strict=True):
                    assert np.array_equal(ours.images.numpy(), theirs.images.numpy())
                    assert np.array_equal(ours.labels.numpy(), theirs.labels.numpy())
        finally:
            stream.close()
    shards = [name for name, *_ in server.requests if name.endswith(".tar")]
    assert sorted(shards) == sorted(f"bucket/set/{shard.name}" for shard in remote.manifest.shards)  # each once


def test_a_cache_that_cannot_hold_what_is_read_together(breaking: tuple[FaultServer, Place], tmp_path: Path) -> None:
    _, place = breaking
    place.cache = ShardCache(tmp_path / "small", 60_000)
    with place.open() as dataset, pytest.raises(DataError, match=r"data\.cache_gb: 6e-05 is too small: a node"):
        SliceStream(dataset, seed=0, batch_size=4, slice_size=4, slices=[0])
