import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.servers import Fault, FaultServer, fault_server

from bessemer.data.manifest import FileRecord
from bessemer.data.reading import shard_cache as module
from bessemer.data.reading.prefetch import Prefetcher
from bessemer.data.reading.shard_cache import CachedShards, ShardCache
from bessemer.errors import DataError, StoreError
from bessemer.stores.opening import open_store
from bessemer.stores.store import Patience, Store

SIZE = 10_000
PATIENCE = Patience(attempts=3, pause=0.001, longest_pause=0.01)


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def record_of(name: str, data: bytes) -> FileRecord:
    return FileRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


FILES = {f"shard-{number:06d}.tar": content(number) for number in range(8)}
RECORDS = [record_of(name, data) for name, data in FILES.items()]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as found:
        found.objects.update(FILES)
        yield found


@pytest.fixture
def store(server: FaultServer) -> Store:
    return open_store(server.url, PATIENCE)


def cache_of(directory: Path, files: float = 8) -> ShardCache:
    return ShardCache(directory / "cache", int(files * SIZE))


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.directory.iterdir()} - {"lock"}


def held(cache: ShardCache) -> list[int]:
    return [number for number, record in enumerate(RECORDS) if cache.holds(record)]


def test_a_file_is_fetched_once_and_named_by_its_hash(server: FaultServer, store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    for _ in range(3):
        assert cache.read(store, RECORDS[2]) == FILES["shard-000002.tar"]
    assert server.answers("shard-000002.tar") == [206]
    assert names(cache) == {RECORDS[2].sha256}
    assert ShardCache(cache.directory, SIZE).holds(RECORDS[2])  # another run


def test_data_sets_with_equal_names_do_not_meet(server: FaultServer, store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    other = {"set/shard-000000.tar": content(99)}
    server.objects.update(other)
    theirs = record_of("shard-000000.tar", other["set/shard-000000.tar"])
    assert cache.read(store, RECORDS[0]) == FILES["shard-000000.tar"]
    assert cache.read(open_store(f"{server.url}/set", PATIENCE), theirs) == other["set/shard-000000.tar"]
    assert cache.read(store, RECORDS[0]) == FILES["shard-000000.tar"]


@pytest.mark.parametrize("what", ["cut", "longer", "flipped", "empty"])
def test_a_stale_copy_is_never_believed(what: str, server: FaultServer, store: Store, tmp_path: Path) -> None:
    cache, data = cache_of(tmp_path), FILES["shard-000001.tar"]
    stale = {"cut": data[:-100], "longer": data + b"0", "flipped": bytes([data[0] ^ 1]) + data[1:], "empty": b""}[what]
    cache.path(RECORDS[1]).write_bytes(stale)
    assert cache.read(store, RECORDS[1]) == data
    assert cache.path(RECORDS[1]).read_bytes() == data
    assert server.answers("shard-000001.tar") == [206]


def test_what_a_killed_download_left_is_written_over(store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    part = cache.directory / f"{RECORDS[0].sha256}.part"
    part.write_bytes(content(5, 2 * SIZE))
    assert cache.read(store, RECORDS[0]) == FILES["shard-000000.tar"]
    assert names(cache) == {RECORDS[0].sha256}


@pytest.mark.parametrize("change", ["other", "longer", "shorter"])
def test_another_file_in_its_place_is_refused(change: str, server: FaultServer, store: Store, tmp_path: Path) -> None:
    data = FILES["shard-000000.tar"]
    server.objects["shard-000000.tar"] = {"other": data[::-1], "longer": data + b"0", "shorter": data[1:]}[change]
    cache = cache_of(tmp_path)
    with pytest.raises((DataError, StoreError), match=r"shard-000000\.tar"):
        cache.fetch(store, RECORDS[0])
    assert names(cache) == set()
    server.objects["shard-000000.tar"] = data
    assert cache.read(store, RECORDS[0]) == data


def test_one_bad_transfer_is_forgiven(server: FaultServer, store: Store, tmp_path: Path) -> None:
    data = FILES["shard-000000.tar"]
    server.objects["shard-000000.tar"] = data[::-1]
    # All of the wrong bytes come; who asks again gets the right ones.
    server.faults["shard-000000.tar"] = [Fault("drop", at=SIZE), Fault("replace", data=data)]
    cache = cache_of(tmp_path)
    cache.fetch(store, RECORDS[0])
    assert cache.path(RECORDS[0]).read_bytes() == data
    assert len(server.requests) == 2


def test_the_oldest_use_makes_room(store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3.5)
    for number in (0, 1, 2):
        cache.fetch(store, RECORDS[number])
        os.utime(cache.path(RECORDS[number]), (number, number))
    cache.touch(RECORDS[0])
    cache.fetch(store, RECORDS[3])
    assert held(cache) == [0, 2, 3]
    assert sum(path.stat().st_size for path in cache.directory.iterdir()) <= cache.limit


def test_a_file_that_is_read_is_not_removed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tmp_path, 2.5)
    shards = CachedShards(store, RECORDS, cache)
    with shards.opened(0) as descriptor:
        os.utime(cache.path(RECORDS[0]), (0, 0))
        for number in (1, 2, 3):
            cache.fetch(store, RECORDS[number])
            assert held(cache) == [0, number]
        assert os.pread(descriptor, SIZE, 0) == FILES["shard-000000.tar"]
        with CachedShards(store, RECORDS, cache).opened(3):
            monkeypatch.setattr(module, "_PATIENCE", 0.1)
            with pytest.raises(DataError, match=r"data\.cache_gb: 2\.5e-05 is too small: every file .* is being read"):
                cache.fetch(store, RECORDS[4])
    cache.fetch(store, RECORDS[4])
    assert held(cache) == [3, 4] or held(cache) == [0, 4]


def test_a_removed_file_is_fetched_again_though_it_was_open(store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 1.5)
    shards = CachedShards(store, RECORDS, cache)
    for number in (0, 1, 0, 2, 0):
        with shards.opened(number) as descriptor:
            assert os.pread(descriptor, SIZE, 0) == FILES[RECORDS[number].name]
            assert held(cache) == [number]
    shards.close()
    assert not shards._open


def test_threads_in_a_small_cache_read_what_they_ask_for(store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 4.5)

    def work(seed: int) -> int:
        shards, rng, most = CachedShards(store, RECORDS, cache), random.Random(seed), 0
        for _ in range(25):
            number = rng.randrange(len(RECORDS))
            with shards.opened(number) as descriptor:
                assert os.pread(descriptor, SIZE, 0) == FILES[RECORDS[number].name]
            present = 0
            for path in cache.directory.iterdir():
                try:
                    present += path.stat().st_size
                except FileNotFoundError:
                    continue
            most = max(most, present)
        shards.close()
        return most

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) <= 1.3 * cache.limit  # files come and go while they are counted
    assert not [name for name in names(cache) if name.endswith(".part")]


def test_a_file_larger_than_the_cache(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache_gb: 5e-06 is less than .*shard-000000\.tar alone"):
        cache_of(tmp_path, 0.5).fetch(store, RECORDS[0])


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*cannot be made"):
        cache_of(tmp_path)


# Processes.


def fetch_all(url: str, directory: Path, start: Any) -> None:
    start.wait()
    cache, store = cache_of(directory), open_store(url, PATIENCE)
    order = list(RECORDS)
    random.Random(os.getpid()).shuffle(order)
    for record in order:
        assert cache.read(store, record) == FILES[record.name]


@pytest.mark.multiprocess
def test_the_workers_of_a_node_download_once(server: FaultServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    workers = [context.Process(target=fetch_all, args=(server.url, tmp_path, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert {name: server.answers(name) for name in FILES} == {name: [206] for name in FILES}


@pytest.mark.multiprocess
def test_a_killed_downloader_leaves_nothing_locked(server: FaultServer, store: Store, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    server.stall = 30.0
    server.faults = {name: [Fault("stall", at=SIZE // 2)] for name in FILES}
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    start.set()
    worker = context.Process(target=fetch_all, args=(server.url, tmp_path, start))
    worker.start()
    deadline = time.monotonic() + 60
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    (name, _, _, sent), *_ = server.requests
    assert sent == SIZE // 2
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert names(cache) == {f"{hashlib.sha256(FILES[name]).hexdigest()}.part"}
    server.faults.clear()
    record = next(record for record in RECORDS if record.name == name)
    assert cache.read(store, record) == FILES[name]
    assert names(cache) == {record.sha256}


def test_prefetching_leaves_room_for_what_the_other_workers_of_the_node_read(store: Store, tmp_path: Path) -> None:
    """Half of a cache of eight files is four: shards 0 to 3, of which this worker reads two."""
    cache = cache_of(tmp_path)
    needed = [(0, False), (1, True), (2, False), (3, True), (4, True), (5, True)]
    shards = CachedShards(store, RECORDS, cache)
    prefetcher = Prefetcher(shards, lambda step: needed, every=1)
    try:
        prefetcher.moved_to(0)
        deadline = time.monotonic() + 30
        while held(cache) != [1, 3] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert prefetcher._plan(0) == []  # nothing more
        assert held(cache) == [1, 3]
    finally:
        prefetcher.close()
        shards.close()
