"""Reading packed images beside webdataset, mosaicml-streaming and litdata, and beside the decoder alone.

All sides deliver batches of 64 uint8 images with labels, shuffled, decoded by simplejpeg on two cores; what counts is
the CPU time per image, of the process and its workers. Peers that are not installed are left out
(`pip install webdataset mosaicml-streaming litdata`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from _common import Ratio, alternate, finish, parse_options, ratio
from PIL import Image

from bessemer.data.index import INDEX_DTYPE, index_bytes
from bessemer.data.manifest import Manifest, data_hash
from bessemer.data.packing.pack import pack
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.stream import SliceStream
from bessemer.files import file_sha256

BATCH, WORKERS = 64, 2
PEERS = {"webdataset": "webdataset", "mosaicml": "mosaicml-streaming", "litdata": "litdata"}
Batches = Iterator[Any]


# The data: photographs are close to noise with a spectrum of 1 / frequency, and so are their JPEG files.


def write_photos(folder: Path, count: int, size: int) -> None:
    """Synthetic photographs in ten classes, JPEG at quality 90 (32 px: 75, as CIFAR's are here)."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    fields = []
    for _ in range(32):
        spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency**1.1
        field = np.fft.irfft2(spectrum, (size, size))
        field += 2 * field.mean(0)  # colours go together
        fields.append(field / field.std() * 50 + 115)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count):
        one, other = rng.choice(len(fields), 2, replace=False)
        mixed = 0.7 * fields[one] + 0.3 * np.roll(fields[other], rng.integers(0, size, 2), (1, 2))
        pixels = np.clip(mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        name = folder / str(number % 10) / f"{number:05d}.jpg"
        Image.fromarray(pixels).save(name, quality=90 if size > 32 else 75)


def samples(folder: Path) -> list[tuple[bytes, int]]:
    """All JPEG files below a folder of classes, with their labels."""
    return [(path.read_bytes(), int(path.parent.name)) for path in sorted(folder.rglob("*.jpg"))]


# The sides. Each is a generator of batches that never ends; it runs in a process of its own.


def decoder_alone(root: Path, size: int) -> Batches:
    """The limit: two processes decode files that lie in memory, each into the same buffer again and again."""
    import simplejpeg

    files = [data for data, _ in samples(root / "photos")]

    def decode(asked: Any, done: Any) -> None:
        out = np.empty((size, size, 3), dtype=np.uint8)
        endless = itertools.cycle(files)
        while True:
            asked.acquire()
            for data in itertools.islice(endless, BATCH):
                simplejpeg.decode_jpeg(data, "RGB", buffer=out)
            done.release()

    context = multiprocessing.get_context("fork")
    asked, done = context.Semaphore(2 * WORKERS), context.Semaphore(0)
    for _ in range(WORKERS):
        context.Process(target=decode, args=(asked, done), daemon=True).start()
    while True:
        done.acquire()
        asked.release()
        yield None


def bessemer(root: Path, _size: int, cache: str = "none") -> Batches:
    """Ours: two decoder threads in the process that trains."""
    dataset = ShardedDataset.open(root / "packed")
    stream = SliceStream(
        dataset, seed=0, batch_size=BATCH, slice_size=BATCH, slices=[0], mirror=True, threads=WORKERS, cache=cache
    )
    for step in itertools.count():
        yield stream.batch(step * BATCH)[0]


def bessemer_cached(root: Path, size: int) -> Batches:
    """Ours, with the decoded images in memory."""
    return bessemer(root, size, "decoded")


def _decode(sample: dict[str, Any]) -> tuple[Any, int]:
    import simplejpeg

    return simplejpeg.decode_jpeg(sample["jpg"], "RGB"), int(sample["cls"])


def _collate(rows: list[tuple[Any, int]]) -> tuple[Any, Any]:
    """A batch from decoded samples, made in the worker."""
    import torch

    return torch.from_numpy(np.stack([pixels for pixels, _ in rows])), torch.tensor([label for _, label in rows])


def _decode_and_collate(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    return _collate([_decode(row) for row in rows])


def _collate_in_place(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The same, decoded straight into the batch, which no peer does by itself."""
    import simplejpeg
    import torch

    height, width, _, _ = simplejpeg.decode_jpeg_header(rows[0]["jpg"])
    pixels = np.empty((len(rows), height, width, 3), dtype=np.uint8)
    for row, out in zip(rows, pixels, strict=True):
        simplejpeg.decode_jpeg(row["jpg"], "RGB", buffer=out)
    return torch.from_numpy(pixels), torch.tensor([int(row["cls"]) for row in rows])


def webdataset(root: Path, _size: int, collate: Callable[[Any], Any] = _decode_and_collate) -> Batches:
    """Two workers that decode, collate and send whole batches; shuffled by a buffer."""
    import webdataset as wds

    shards = [str(path) for path in sorted((root / "packed").glob("*.tar"))]
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False, handler=wds.reraise_exception)
    data = data.shuffle(1000, initial=100).batched(BATCH, collation_fn=collate)
    yield from wds.WebLoader(data, batch_size=None, num_workers=WORKERS)


def webdataset_in_place(root: Path, size: int) -> Batches:
    """The same with a collate function that spares a copy of each image."""
    return webdataset(root, size, _collate_in_place)


def mosaicml(root: Path, _size: int) -> Batches:
    """An MDS set of the same files, two workers."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    directory = str(root / "mds")
    if not Path(directory).exists():
        with MDSWriter(out=directory, columns={"jpg": "bytes", "cls": "int"}) as writer:
            for data, label in samples(root / "photos"):
                writer.write({"jpg": data, "cls": label})
    photos = StreamingDataset(local=directory, shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = DataLoader(
        photos, BATCH, num_workers=WORKERS, collate_fn=_decode_and_collate, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def _as_litdata(sample: tuple[bytes, int]) -> dict[str, Any]:
    return {"jpg": sample[0], "cls": sample[1]}


def litdata(root: Path, _size: int) -> Batches:
    """An optimised set of the same files, two workers."""
    import litdata as ld

    directory = str(root / "litdata")
    if not Path(directory).exists():
        ld.optimize(_as_litdata, samples(root / "photos"), directory, chunk_bytes="64MB", num_workers=1, verbose=False)
    photos = ld.StreamingDataset(directory, shuffle=True, drop_last=True)
    loader = ld.StreamingDataLoader(
        photos, batch_size=BATCH, num_workers=WORKERS, collate_fn=_decode_and_collate, persistent_workers=True
    )
    while True:
        yield from loader


SIDES: dict[str, Callable[[Path, int], Batches]] = {
    "decoder": decoder_alone,
    "bessemer": bessemer,
    "cached": bessemer_cached,
    "webdataset": webdataset,
    "webdataset_in_place": webdataset_in_place,
    "mosaicml": mosaicml,
    "litdata": litdata,
}


# A process per side, which waits while another is measured.


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all below it, from /proc, in steps of 10 ms."""
    total, tick = 0.0, os.sysconf("SC_CLK_TCK")
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                times[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        total += times.get(one, 0.0)
        waiting += children.get(one, [])
    return total


def serve(side: str, root: Path, size: int, pipe: Connection) -> None:
    """Deliver as many images as asked, and answer with the CPU seconds and the seconds that it took."""
    os.setpgid(0, 0)
    sys.stdout = io.StringIO()  # peers print
    import torch

    torch.set_num_threads(1)
    batches = SIDES[side](root, size)
    while (images := pipe.recv()) is not None:
        cpu, wall = cpu_seconds(os.getpid()), time.perf_counter()
        for _ in range(images // BATCH):
            next(batches)
        pipe.send((cpu_seconds(os.getpid()) - cpu, time.perf_counter() - wall))
    os._exit(0)


class Side:
    """A loader in a process of its own."""

    def __init__(self, name: str, root: Path, size: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, root, size, theirs))
        self._process.start()
        theirs.close()
        self.walls: list[float] = []

    def microseconds(self, images: int) -> float:
        """CPU time per image of the next `images`."""
        self._pipe.send(images)
        cpu, wall = self._pipe.recv()
        self.walls.append(wall)
        return float(cpu / images * 1e6)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, 9)  # its workers too


def compare(names: list[str], root: Path, size: int, images: dict[str, int], rounds: int) -> dict[str, list[float]]:
    """CPU microseconds per image of each side, in turn."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for name in names:
            sides[name] = Side(name, root, size)
            stack.callback(sides[name].stop)
        turns = {name: lambda name=name: sides[name].microseconds(images.get(name, images["others"])) for name in names}
        return alternate(turns, rounds)


def make_set(root: Path, size: int, count: int) -> Path:
    """Photographs as files and packed."""
    write_photos(root / "photos", count, size)
    pack(root / "photos", root / "packed", shard_bytes=16 << 20)
    return root


# Resuming, and a large index.


def seconds_to_first_batch(root: Path, rounds: int) -> list[float]:
    """From nothing to the first batch of a run that goes on somewhere in its first thousand epochs."""
    found = []
    for nimg in np.random.default_rng(1).integers(0, 1000 * 2048, rounds).tolist():
        then = time.perf_counter()
        with ShardedDataset.open(root / "packed") as dataset:
            stream = SliceStream(dataset, seed=0, batch_size=BATCH, slice_size=BATCH // 4, slices=range(4), threads=2)
            stream.batch(nimg // BATCH * BATCH)[0].labels.sum()
            found.append(time.perf_counter() - then)
            stream.close()
    return found


def write_large_set(directory: Path, shards: int = 1200, per_shard: int = 1000) -> None:
    """Manifest and index of 1.2 million images of 40 kB; the shards are holes of the right size."""
    directory.mkdir()
    stride = 40 << 10
    index = np.zeros(shards * per_shard, dtype=INDEX_DTYPE)
    index["offset"] = np.tile(np.arange(per_shard, dtype=np.int64) * stride + 512, shards)
    index["length"], index["label"] = stride - 1024, np.arange(len(index)) % 1000
    (directory / "index.npy").write_bytes(index_bytes(index))
    fields: dict[str, Any] = Manifest.load(directory.parent / "packed").model_dump()
    record = {"bytes": per_shard * stride + 1024, "sha256": "0" * 64, "samples": per_shard}
    fields |= {
        "classes": [f"class{label}" for label in range(1000)],
        "class_counts": [len(index) // 1000] * 1000,
        "samples": len(index),
        "shards": [{"name": f"shard-{number:06d}.tar", **record} for number in range(shards)],
        "index": {
            "name": "index.npy",
            "bytes": (directory / "index.npy").stat().st_size,
            "sha256": file_sha256(directory / "index.npy"),
        },
    }
    for shard in fields["shards"]:
        with (directory / shard["name"]).open("wb") as file:
            file.truncate(shard["bytes"])
    fields["hash"] = data_hash(fields)
    Manifest.model_validate(fields).save(directory)


def open_large_set(directory: Path) -> tuple[float, float]:
    """Seconds to open it and to know the first ids of 64 lanes; and the megabytes that stay."""
    before, then = _resident(), time.perf_counter()
    with ShardedDataset.open(directory) as dataset:
        stream = SliceStream(dataset, seed=0, batch_size=256, slice_size=4, slices=range(64), threads=0, cache="none")
        for lane in range(64):
            stream.order.ids(lane, 10**9, 4)
        seconds = time.perf_counter() - then
        return seconds, (_resident() - before) / 1e6


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _fresh(function: Callable[[Path], Any], argument: Path) -> Any:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


def main() -> int:
    """Measure, print, and say whether the goals were met."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # peers' workers are killed with what they hold
    options = parse_options(__doc__)
    peers = []
    for name, package in PEERS.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(package)
            peers.append(name)
    rounds, count = (1, 256) if options.quick else (5, 2048)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as place:
        large, small = make_set(Path(place) / "256", 256, count), make_set(Path(place) / "32", 32, 4096)
        others = 1024 if options.quick else 2048
        tuned = ["webdataset_in_place"] if "webdataset" in peers else []
        at_256 = compare(["decoder", "bessemer", *peers, *tuned], large, 256, {"others": others}, rounds)
        many = {"cached": 128 * others, "others": 4 * others}
        at_32 = compare(["cached", *peers], small, 32, many, rounds)
        resume = seconds_to_first_batch(large, 5 if options.quick else 50)
        write_large_set(large / "large")
        opening, resident = _fresh(open_large_set, large / "large")
    ratios = [ratio("loader/decoder", at_256["bessemer"], at_256["decoder"], goal=1 / 0.85)]
    if peers:
        best, best_small = (min(peers, key=lambda p: statistics.median(found[p])) for found in (at_256, at_32))
        ratios.append(ratio(f"loader/{best}", at_256["bessemer"], at_256[best], goal=1 / 1.8))
        ratios.append(ratio(f"cached/{best_small}", at_32["cached"], at_32[best_small], goal=0.1))
    ratios += [ratio(f"loader/{name}", at_256["bessemer"], at_256[name]) for name in tuned]
    ratios += [
        Ratio("resume_seconds", statistics.median(resume), 0.5, rounds=len(resume)),
        Ratio("resume_seconds_worst", max(resume), 0.5, rounds=len(resume)),
        Ratio("open_1.2M_seconds", opening, 2.0),
        Ratio("open_1.2M_megabytes", resident, 300.0),
    ]
    raw = {
        "cpu_microseconds_per_image_256": at_256,
        "cpu_microseconds_per_image_32": at_32,
        "resume": resume,
        "peers": {name: metadata.version(PEERS[name]) for name in peers},
    }
    return finish(ratios, raw, options)


if __name__ == "__main__":
    raise SystemExit(main())
