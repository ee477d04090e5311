"""Samples that are more than one image, from packing to the batch: compared with files read by PIL and tarfile."""

import io
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from bessemer.data.manifest import Manifest
from bessemer.data.packing.pack import pack
from bessemer.data.packing.verify import verify
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.data.reading.quarantine import Quarantine
from bessemer.data.reading.stream import SliceStream
from bessemer.errors import DataError

Encode = Callable[..., bytes]
Draw = Callable[..., Image.Image]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


def numbers(pixels: np.ndarray) -> torch.Tensor:
    """[..., H, W, C] bytes as a batch has them, computed in float64."""
    return torch.from_numpy(np.moveaxis(pixels.astype(np.float64) / 127.5 - 1, -1, -3))


def stream(dataset: ShardedDataset, slices: list[int], **options: object) -> SliceStream:
    settings = {"seed": 3, "batch_size": 8, "slice_size": 4, "threads": 0, **options}
    return SliceStream(dataset, slices=slices, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory, draw: Draw, encode: Encode) -> Path:
    """22 photographs and grey drawings, both made from the number in their name."""
    folder = tmp_path_factory.mktemp("pairs")
    for side in ("input", "target"):
        (folder / side).mkdir()
    for number in range(22):
        (folder / "input" / f"{number:02d}.png").write_bytes(encode(draw(number, mode="L")))
        (folder / "target" / f"{number:02d}.jpg").write_bytes(encode(draw(100 + number), "JPEG"))
    return folder


@pytest.fixture(scope="module")
def pairs(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed") / "pairs"
    manifest = pack(pair_folder, place, kind="pairs", shard_bytes=20 << 10)
    assert len(manifest.shards) > 2
    return place


def stored_pairs(place: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the shards hold, by tarfile and PIL alone."""
    found: list[dict[str, np.ndarray]] = []
    for shard in sorted(place.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                number, _, ending = member.name.partition(".")
                if int(number) == len(found):
                    found.append({})
                if ending != "cls":
                    file = tar.extractfile(member)
                    assert file is not None
                    pixels = np.asarray(Image.open(file))
                    found[-1][ending.partition(".")[0]] = pixels[..., None] if pixels.ndim == 2 else pixels
    return [(one["images"], one["targets"]) for one in found]


def test_pairs_stay_together_from_the_source_to_the_batch(pairs: Path, pair_folder: Path) -> None:
    manifest = Manifest.load(pairs)
    assert manifest.kind == "pairs"
    assert [(one.name, one.shape, one.encoding) for one in manifest.batch_fields] == [
        ("images", [1, 16, 16], "png"),
        ("targets", [3, 16, 16], "jpg"),
    ]
    assert manifest.facts == {"resolution": 16, "channels": 1, "target_channels": 3, "classes": 1}
    source = {
        (pair_folder / "input" / f"{n:02d}.png").read_bytes(): (pair_folder / "target" / f"{n:02d}.jpg").read_bytes()
        for n in range(22)
    }
    for shard in pairs.glob("*.tar"):  # byte for byte as they came
        with tarfile.open(shard) as tar:
            contents = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
            for name, data in contents.items():
                if name.endswith(".images.png"):
                    assert source.pop(data) == contents[name.replace("images.png", "targets.jpg")]
    assert not source
    truth = stored_pairs(pairs)
    with ShardedDataset.open(pairs) as dataset:
        both = stream(dataset, [0, 1], mirror=True)
        flipped = 0
        for step in range(6):
            for lane, batch in enumerate(both.batch(8 * step)):
                assert batch.names == ("images", "targets")
                moved = batch.to(torch.device("cpu"), torch.channels_last)
                assert moved["targets"].is_contiguous(memory_format=torch.channels_last)
                for row, number in enumerate(both.order.ids(lane, 4 * step, 4).tolist()):
                    image, target = (numbers(pixels) for pixels in truth[number])
                    turned = not close(batch.images[row], image)
                    flipped += turned
                    assert close(moved.images[row], image.flip(-1) if turned else image)
                    assert close(batch["targets"][row], target.flip(-1) if turned else target)
        assert 10 < flipped < 38


@pytest.mark.parametrize(
    "layout",
    ["{side}/{name}.png", "train/{side}/{name}.png", "{side}/train/{name}.png", "{name}.{side}.png"],
)
@pytest.mark.parametrize("words", [("input", "target"), ("A", "B")])
def test_layouts_of_pairs(layout: str, words: tuple[str, str], tmp_path: Path, draw: Draw, encode: Encode) -> None:
    for side, word in enumerate(words):
        for number in range(3):
            path = tmp_path / "source" / layout.format(side=word, name=f"x{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(draw(10 * side + number)))
    manifest = pack(tmp_path / "source", tmp_path / "set", kind="pairs")
    assert (manifest.samples, manifest.class_counts) == (3, [3])
    expected = {draw(n).tobytes(): draw(10 + n).tobytes() for n in range(3)}
    assert {a.tobytes(): b.tobytes() for a, b in stored_pairs(tmp_path / "set")} == expected


def test_names_alone_say_that_there_are_pairs(tmp_path: Path, draw: Draw, encode: Encode) -> None:
    for side in ("input", "target"):
        for label in ("cat", "dog"):
            path = tmp_path / "source" / label / f"x.{side}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(draw(1)))
    manifest = pack(tmp_path / "source", tmp_path / "set")
    assert (manifest.kind, manifest.classes, manifest.class_counts) == ("pairs", ["cat", "dog"], [1, 1])
    again = pack(tmp_path / "set", tmp_path / "again")  # a data set is a source too
    assert (again.kind, again.samples) == ("pairs", 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["input/a", "input/b", "target/a"], r"1 images have no other half \(input/b\.png\).*add it, or remove"),
        (["input/a", "target/a", "extra/c"], r"1 images are neither inputs nor targets \(extra/c\.png\)"),
        (["input/a", "A/a", "target/a"], r"A/a\.png and input/a\.png are both the input of one pair"),
    ],
)
def test_pairs_with_a_missing_half(files: list[str], message: str, tmp_path: Path, draw: Draw, encode: Encode) -> None:
    for name in files:
        path = tmp_path / "source" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(1)))
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "source", tmp_path / "set", kind="pairs")
    assert not (tmp_path / "set").exists()


def test_pairs_of_different_size_and_mode(tmp_path: Path, draw: Draw, encode: Encode) -> None:
    for side, size in (("input", 16), ("target", 32)):
        (tmp_path / "source" / side).mkdir(parents=True)
        (tmp_path / "source" / side / "x.png").write_bytes(encode(draw(1, (size, size))))
    with pytest.raises(DataError, match=r"(?s)sizes differ.*16x16.*--size 16"):
        pack(tmp_path / "source", tmp_path / "set", kind="pairs")
    (tmp_path / "source" / "target" / "x.png").write_bytes(encode(draw(1, mode="RGBA")))
    with pytest.raises(DataError, match=r"colour modes of targets differ"):
        pack(tmp_path / "source", tmp_path / "set", kind="pairs")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_pairs(pairs: Path) -> None:
    shards = sorted(map(str, pairs.glob("*.tar")))
    samples = list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [set(sample) >= {"images.png", "targets.jpg", "cls"} for sample in samples] == [True] * 22
    for sample, (image, target) in zip(samples, stored_pairs(pairs), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["images.png"])))[..., None], image)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["targets.jpg"]))), target)


def test_a_pair_is_replaced_whole(pairs: Path, tmp_path: Path) -> None:
    """A damaged target: named by file and byte, found by verify, and never beside another's input."""
    import shutil

    place = shutil.copytree(pairs, tmp_path / "set")
    with ShardedDataset.open(place) as dataset:
        offset, length = int(dataset._offsets[7, 1]), int(dataset._lengths[7, 1])
        shard = place / dataset.manifest.shards[int(dataset.shards_of(np.array([7]))[0])].name
    data = bytearray(shard.read_bytes())
    data[offset + length // 2] ^= 0xFF
    shard.write_bytes(data)
    assert any(f"sample 00000007 at byte {offset}" in fault.problem for fault in verify(place, deep=True))
    with ShardedDataset.open(place) as dataset, pytest.raises(DataError, match=rf"file 2 of it at byte {offset}"):
        dataset.read(np.array([7]))
    truth = stored_pairs(pairs)
    with ShardedDataset.open(place) as dataset:
        dataset.quarantine = Quarantine(1)
        found = dataset.read_fields(np.array([6, 7]))
        image, target = found["images"][1].transpose(1, 2, 0), found["targets"][1].transpose(1, 2, 0)
        assert [i for i, (a, b) in enumerate(truth) if np.array_equal(a, image) and np.array_equal(b, target)] != [7]
        assert any(np.array_equal(a, image) and np.array_equal(b, target) for a, b in truth)


# Two domains


def test_domains_have_orders_and_epochs_of_their_own(tmp_path: Path, draw: Draw, encode: Encode) -> None:
    """12 images of one domain and 20 of the other, as CycleGAN's sets are laid out."""
    for folder, count, first in (("trainA", 12, 0), ("trainB", 20, 100), ("testA", 2, 200), ("testB", 2, 300)):
        (tmp_path / "source" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "source" / folder / f"{number:02d}.png").write_bytes(encode(draw(first + number)))
    manifest = pack(tmp_path / "source", tmp_path / "set", shard_bytes=8 << 10)
    assert (manifest.kind, manifest.classes, manifest.class_counts) == ("domains", ["A", "B"], [12, 20])
    assert (manifest.packing.split, manifest.facts["classes"]) == ("train", 1)
    names = [{draw(first + n).tobytes(): n for n in range(count)} for first, count in ((0, 12), (100, 20))]

    def drawn(dataset: ShardedDataset, slices: list[int], steps: range, **options: object) -> list[list[list[int]]]:
        """The numbers of the images of either domain in each batch."""
        with_them = stream(dataset, slices, **options)
        found = []
        for step in steps:
            for batch in with_them.batch(8 * step):
                assert batch.names == ("images", "others")
                assert batch.labels.tolist() == [0] * 4
                pixels = [
                    ((batch[name] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy() for name in batch.names
                ]
                found.append([[names[side][one.tobytes()] for one in pixels[side]] for side in range(2)])
        with_them.close()
        return found

    with ShardedDataset.open(tmp_path / "set") as dataset:
        assert len(dataset.manifest.shards) > 3
        whole = drawn(dataset, [0, 1], range(30))
        for side, count in enumerate((12, 20)):
            for lane in range(2):
                seen = [number for batch in whole[lane::2] for number in batch[side]]
                length = count // 2  # of the lane, in one epoch
                for epoch in range(len(seen) // length):
                    assert len(set(seen[epoch * length : (epoch + 1) * length])) == length
            per_epoch = count // 8 * 2
            assert {n for batch in whole[: per_epoch + 2] for n in batch[side]} == set(range(count))
        partners = [tuple(pair) for batch in whole for pair in zip(*batch, strict=True)]
        assert len(set(partners)) > 0.5 * len(partners)  # of 240 pairs, drawn 240 times
        for rank in range(2):  # two workers, resumed, with threads and without the decoded cache
            expected = [batch for step in range(5, 9) for batch in [whole[2 * step + rank]]]
            assert drawn(dataset, [rank], range(5, 9), threads=2, cache="none") == expected
    with pytest.raises(DataError, match=r"has 1 class folders \(all\); two domains are two folders"):
        pack(tmp_path / "source" / "trainA", tmp_path / "one", kind="domains")


def test_equal_domains_are_not_drawn_in_step(tmp_path: Path, draw: Draw, encode: Encode) -> None:
    for folder, first in (("a", 0), ("b", 100)):
        (tmp_path / "source" / folder).mkdir(parents=True)
        for number in range(16):
            (tmp_path / "source" / folder / f"{number:02d}.png").write_bytes(encode(draw(first + number)))
    pack(tmp_path / "source", tmp_path / "set", kind="domains")
    names = [{draw(first + n).tobytes(): n for n in range(16)} for first in (0, 100)]
    with ShardedDataset.open(tmp_path / "set") as dataset:
        reader = stream(dataset, [0, 1])
        drawn: list[list[int]] = [[], []]
        for batch in (batch for step in range(8) for batch in reader.batch(8 * step)):
            for side, field in enumerate(("images", "others")):
                pixels = ((batch[field] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
                drawn[side] += [names[side][one.tobytes()] for one in pixels]
        reader.close()
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted(4 * list(range(16)))
    assert len(set(zip(*drawn, strict=True))) > 32  # 16 if an image met the same one in each of four epochs


# Clips


def clip(seed: int, frames: int, size: int = 16) -> np.ndarray:
    """[T, H, W, 3], each frame another."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def write_clip(folder: Path, frames: np.ndarray, encode: Encode) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, start=8):  # 8, 9, 10: not in the order of the letters
        (folder / f"{number}.png").write_bytes(encode(Image.fromarray(frame)))


def test_clips_are_whole_and_in_order(tmp_path: Path, encode: Encode) -> None:
    source = {
        f"{label}/{name}": clip(ord(name) + 1000 * len(label), 5) for label in ("run", "walk") for name in "abcdefgh"
    }
    for place, frames in source.items():
        write_clip(tmp_path / "source" / place, frames, encode)
    manifest = pack(tmp_path / "source", tmp_path / "set", kind="clips", shard_bytes=20 << 10)
    assert manifest.facts == {"resolution": 16, "channels": 3, "frames": 5, "classes": 2}
    assert (manifest.samples, manifest.classes, manifest.packing.passed_through) == (16, ["run", "walk"], 16)
    assert verify(tmp_path / "set", deep=True) == []
    labels = {frames.tobytes(): int(place.startswith("walk")) for place, frames in source.items()}
    with ShardedDataset.open(tmp_path / "set") as dataset:
        read = dataset.read(np.arange(16))
        assert read.shape == (16, 5, 3, 16, 16)
        for one, label in zip(read, dataset.labels.tolist(), strict=True):
            assert labels.pop(np.ascontiguousarray(one.transpose(0, 2, 3, 1)).tobytes()) == label
        assert not labels
        both = stream(dataset, [0, 1], mirror=True)
        turned = 0
        for step in range(4):
            for lane, batch in enumerate(both.batch(8 * step)):
                assert batch["clips"].shape == (4, 5, 3, 16, 16)
                for row, number in enumerate(both.order.ids(lane, 4 * step, 4).tolist()):
                    expected = numbers(read[number].transpose(0, 2, 3, 1))
                    is_turned = not close(batch["clips"][row], expected)
                    turned += is_turned
                    # All frames the same way round.
                    assert close(batch["clips"][row], expected.flip(-1) if is_turned else expected)
        assert 4 < turned < 28


def test_clips_from_animations_and_arrays(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, 6, 16, 16), dtype=np.uint8)
    for name, options in (("gif", {}), ("webp", {"lossless": True})):
        for number, frames in enumerate(grey):
            path = tmp_path / name / f"{number}.{name}"
            path.parent.mkdir(exist_ok=True)
            first, *rest = [Image.fromarray(frame) for frame in frames]
            first.save(path, save_all=True, append_images=rest, **options)  # type: ignore[arg-type]
    np.savez(tmp_path / "clips.npz", images=grey, labels=np.array([1, 0, 1]))
    expected = {frames.tobytes() for frames in grey}
    for place, kind in ((tmp_path / "gif", None), (tmp_path / "webp", "clips"), (tmp_path / "clips.npz", "clips")):
        done = tmp_path / f"set-{place.name}"
        manifest = pack(place, done, kind=kind, mode="L")  # type: ignore[arg-type]
        assert manifest.facts["frames"] == 6
        assert manifest.class_counts == ([1, 2] if place.suffix else [3])
        with ShardedDataset.open(done) as dataset:
            assert {one.tobytes() for one in dataset.read(np.arange(3))} == expected


def test_clips_of_unequal_length_are_cut_where_a_length_is_given(tmp_path: Path, encode: Encode) -> None:
    clips = {"a": clip(1, 7), "b": clip(2, 4), "c": clip(3, 2)}
    for name, frames in clips.items():
        write_clip(tmp_path / "source" / name, frames, encode)
    with pytest.raises(DataError, match=r"lengths differ: 2 frames: 1 \(c/8\.png\); 4 frames.*--length 2"):
        pack(tmp_path / "source", tmp_path / "set", kind="clips")
    with pytest.raises(DataError, match=r"--length 9 is more than the longest has \(7 frames\)"):
        pack(tmp_path / "source", tmp_path / "set", kind="clips", length=9)
    manifest = pack(tmp_path / "source", tmp_path / "set", kind="clips", length=3)
    assert (manifest.samples, manifest.packing.ignored) == (3, {"shorter than 3": 1})
    with ShardedDataset.open(tmp_path / "set") as dataset:
        found = {np.ascontiguousarray(one.transpose(0, 2, 3, 1)).tobytes() for one in dataset.read(np.arange(3))}
    assert found == {clips["a"][:3].tobytes(), clips["a"][3:6].tobytes(), clips["b"][:3].tobytes()}
    with pytest.raises(DataError, match=r"--length 3 cuts clips and sound"):
        pack(tmp_path / "source", tmp_path / "images", kind="images", length=3)


# Sound


def write_wave(path: Path, sound: np.ndarray, rate: int = 8000, width: int = 2, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(sound.tobytes())


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, count).astype("<i2")


def test_sound_is_cut_into_pieces_that_follow_each_other(tmp_path: Path) -> None:
    recordings = {"low/a": noise(1, 1000), "low/b": noise(2, 250), "high/c": noise(3, 430), "high/d": noise(4, 90)}
    for name, sound in recordings.items():
        write_wave(tmp_path / "source" / f"{name}.wav", sound)
    manifest = pack(tmp_path / "source", tmp_path / "set", length=100)
    assert manifest.facts == {"samples": 100, "rate": 8000, "classes": 2}
    assert (manifest.kind, manifest.class_counts) == ("audio", [4, 12])
    assert manifest.packing.ignored == {"shorter than 100": 1}
    assert verify(tmp_path / "set", deep=True) == []
    pieces = {
        sound[start : start + 100].tobytes(): int(name.startswith("low"))
        for name, sound in recordings.items()
        for start in range(0, len(sound) - 99, 100)
    }
    with ShardedDataset.open(tmp_path / "set") as dataset:
        read = dataset.read(np.arange(16))
        assert {one.tobytes(): label for one, label in zip(read, dataset.labels.tolist(), strict=True)} == pieces
        batch = stream(dataset, [1]).batch(16)[0]
        ids = stream(dataset, [1]).order.ids(1, 8, 4)
        assert torch.equal(batch["audio"], torch.from_numpy(read[ids].astype(np.float64) / 32768).float())
    for shard in (tmp_path / "set").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".wav"):
                    with wave.open(tar.extractfile(member)) as file:  # type: ignore[arg-type]
                        assert file.readframes(101) in pieces
    from_tar = tmp_path / "source.tar"
    with tarfile.open(from_tar, "w") as tar:
        tar.add(tmp_path / "source", "x")
    assert pack(from_tar, tmp_path / "again", length=100).hash == manifest.hash


@pytest.mark.parametrize("width", [1, 3, 4])
def test_other_widths_keep_their_upper_sixteen_bits(width: int, tmp_path: Path) -> None:
    values = noise(5, 64).astype(np.int64)
    if width == 1:
        values = values >> 8
        data = (values + 128).astype(np.uint8)
        values = values << 8
    else:
        lower = np.random.default_rng(6).integers(0, 1 << 8 * (width - 2), 64)
        wide = (values << 8 * (width - 2)) + lower
        data = np.array([int(v).to_bytes(width, "little", signed=True) for v in wide])
    write_wave(tmp_path / "source" / "x.wav", data, width=width)
    pack(tmp_path / "source", tmp_path / "set")
    with ShardedDataset.open(tmp_path / "set") as dataset:
        assert dataset.read(np.array([0]))[0].tolist() == values.tolist()


def test_what_is_wrong_with_sound_is_named(tmp_path: Path) -> None:
    write_wave(tmp_path / "rates" / "a.wav", noise(1, 100), rate=16000)
    write_wave(tmp_path / "rates" / "b.wav", noise(1, 100), rate=44100)
    with pytest.raises(DataError, match=r"sample rates differ: 16000 Hz: 1 \(a\.wav\); 44100 Hz.*ffmpeg -i FILE -ar"):
        pack(tmp_path / "rates", tmp_path / "set")
    write_wave(tmp_path / "stereo" / "a.wav", noise(1, 100), channels=2)
    (tmp_path / "stereo" / "b.wav").write_bytes(b"RIFFxxxx")
    with pytest.raises(DataError, match=r"(?s)2 of 2 files cannot be used.*a\.wav: it has 2 channels.*b\.wav: no WAV"):
        pack(tmp_path / "stereo", tmp_path / "set")
    write_wave(tmp_path / "short" / "a.wav", noise(1, 100))
    whole = (tmp_path / "short" / "a.wav").read_bytes()
    (tmp_path / "short" / "a.wav").write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"a\.wav: .*cut off"):
        pack(tmp_path / "short", tmp_path / "set")


# Bits


@pytest.mark.parametrize("shape", [(21,), (5, 5), (1, 4, 4)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_bits_are_packed_and_come_back(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (30, *shape))
    np.savez(tmp_path / "bits.npz", x=bits.astype(dtype), y=np.arange(30) % 3)
    manifest = pack(tmp_path / "bits.npz", tmp_path / "set", kind="bits")
    count = int(np.prod(shape))
    assert manifest.facts == {"bits": count, "classes": 3}
    assert verify(tmp_path / "set", deep=True) == []
    rows = sorted((row.tolist(), number % 3) for number, row in enumerate(bits.reshape(30, -1)))
    for cache in ("none", "decoded"):
        with ShardedDataset.open(tmp_path / "set") as dataset:
            read = dataset.read(np.arange(30))
            assert sorted(zip(read.tolist(), dataset.labels.tolist(), strict=True)) == rows
            some = stream(dataset, [0, 1], cache=cache)
            for lane, batch in enumerate(some.batch(0)):
                assert batch["bits"].dtype == torch.float32
                assert batch["bits"].tolist() == read[some.order.ids(lane, 0, 4)].tolist()
                assert batch.to(torch.device("meta"))["bits"].shape == (4, count)


def test_what_is_no_bit_is_named(tmp_path: Path) -> None:
    values = np.zeros((5, 4))
    values[3, 2] = 0.5
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(DataError, match=r"x\.npy has 0\.5 in sample 3; bits are 0 or 1: .*\(x > 0\.5\)"):
        pack(tmp_path / "x.npy", tmp_path / "set", kind="bits")
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "x.png")
    with pytest.raises(DataError, match=r"x\.png is no array; bits come as NumPy arrays"):
        pack(tmp_path / "images", tmp_path / "set", kind="bits")
