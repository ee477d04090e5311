"""Writing shards beside `webdataset.ShardWriter`, and packing as a whole, in seconds of CPU: 256-pixel JPEGs.

Goal: our writer, with sha256 of the shard and crc32 and offset of each sample, takes at most 1/1.5 of ShardWriter,
which has none of these. Both get the same bytes and write to the same disk. `decoded/pack` says what checking every
image by decoding it adds, which only we do; it has no goal.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import webdataset as wds
from _common import alternate, finish, parse_options, ratio
from PIL import Image

from bessemer.data.packing.prepare import Rules
from bessemer.data.packing.shard_task import ShardTask, pack_shard
from bessemer.data.packing.shards import ShardWriter
from bessemer.data.sources.archives import FolderFiles
from bessemer.data.sources.source import Entry

SIZE, QUALITY, DISTINCT = 256, 90, 64


def pictures() -> list[bytes]:
    """JPEGs with the detail of photographs: smooth shapes and fine noise."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=QUALITY)
        found.append(file.getvalue())
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of CPU of all threads, user and system: the disk's own time is not the writers' merit."""
    before = os.times()
    work()
    after = os.times()
    return after.user + after.system - before.user - before.system


def measure(folder: Path, samples: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU of each side; sides in turn."""
    images = pictures()
    source = folder / "source"
    source.mkdir()
    paths = [PurePosixPath(f"{number:06d}.jpg") for number in range(samples)]
    for number, path in enumerate(paths):
        (source / path).write_bytes(images[number % DISTINCT])

    def ours() -> None:
        writer = ShardWriter(folder / "shard-000000.tar", 0)
        for number in range(samples):
            writer.add([("jpg", images[number % DISTINCT])], number % 10)
        writer.finish()

    def theirs(encoder: bool) -> None:
        with wds.ShardWriter(str(folder / "wds-%06d.tar"), maxcount=samples, verbose=0, encoder=encoder) as writer:
            for number in range(samples):
                label: object = number % 10 if encoder else str(number % 10).encode()
                writer.write({"__key__": f"{number:08d}", "jpg": images[number % DISTINCT], "cls": label})

    def whole() -> None:
        entries = [(Entry(str(number % 10), path.name, (path,)), number % 10) for number, path in enumerate(paths)]
        rules = Rules(size=None, resize="none", mode=None)
        pack_shard(ShardTask(FolderFiles(source, paths), entries, rules, folder, 1, 0, threads=2))

    sides = {
        "ours": lambda: cpu_seconds(ours),
        "ShardWriter": lambda: cpu_seconds(lambda: theirs(True)),
        "ShardWriter without encoder": lambda: cpu_seconds(lambda: theirs(False)),
        "decoded": lambda: cpu_seconds(whole),
    }
    return alternate(sides, rounds)


def run() -> int:
    """Measure, print, write."""
    options = parse_options(__doc__)
    samples, rounds = (500, 3) if options.quick else (6000, 7)
    with tempfile.TemporaryDirectory() as directory:
        seconds = measure(Path(directory), samples, rounds)
    found = [
        ratio("pack/ShardWriter", seconds["ours"], seconds["ShardWriter"], goal=1 / 1.5),
        ratio("pack/ShardWriter-raw", seconds["ours"], seconds["ShardWriter without encoder"]),
        ratio("decoded/pack", seconds["decoded"], seconds["ours"]),
    ]
    return finish(found, {"cpu_seconds": seconds, "samples": samples}, options)


if __name__ == "__main__":
    sys.exit(run())
