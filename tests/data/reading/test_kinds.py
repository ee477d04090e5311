"""Samples that are more than one image, from packing to the batch: compared with files read by PIL and tarfile."""

import io
import tarfile
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
