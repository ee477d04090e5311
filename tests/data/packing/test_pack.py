import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.packing.folders import files_of

from bessemer.data.manifest import Manifest
from bessemer.data.packing.pack import mode_named, pack, resize_named
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.errors import DataError

Draw = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def test_the_same_input_gives_the_same_bytes(tree: Path, packed: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        pack(tree, tmp_path / str(threads), shard_bytes=40 << 10, threads=threads)
        assert files_of(tmp_path / str(threads)) == files_of(packed)


@pytest.mark.parametrize("kind", ["tar", "tar.xz", "zip"])
def test_an_archive_gives_the_same_data_as_its_folder(kind: str, tree: Path, packed: Path, tmp_path: Path) -> None:
    archive = tmp_path / f"images.{kind}"
    paths = sorted(tree.rglob("*.*"), reverse=True)
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in paths:
                zipped.write(path, Path("set") / path.relative_to(tree))
    else:
        with tarfile.open(archive, "w:xz" if kind == "tar.xz" else "w") as tar:
            for path in paths:
                tar.add(path, Path("set") / path.relative_to(tree))
    manifest = pack(archive, tmp_path / "set", shard_bytes=40 << 10)
    assert manifest.hash == Manifest.load(packed).hash


def test_every_image_is_stored_once_as_it_was(tree: Path, packed: Path) -> None:
    manifest = Manifest.load(packed)
    assert (manifest.samples, manifest.class_counts, manifest.encoding) == (60, [20, 20, 20], "mixed")
    assert manifest.packing.passed_through == 60
    stored: list[tuple[str, bytes]] = []
    for shard in manifest.shards:
        assert (packed / shard.name).stat().st_size == shard.bytes < 60 << 10
        with tarfile.open(packed / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = sorted({name.split(".")[0] for name in members})
        labels = {key: int(members[f"{key}.cls"]) for key in keys}
        assert set(labels.values()) == {0, 1, 2}, "a shard holds all classes"
        for name, data in members.items():
            key, ending = name.split(".")
            if ending != "cls":
                stored.append((manifest.classes[labels[key]], data))
    given = [(path.parent.name, path.read_bytes()) for path in tree.rglob("*.*")]
    assert sorted(stored) == sorted(given)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_the_shards(packed: Path, truth: tuple[np.ndarray, np.ndarray]) -> None:
    wds = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in packed.glob("*.tar"))
    pixels, labels = truth
    samples = list(
        wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg;png", "cls")
    )
    assert [label for _, label in samples] == labels.tolist()
    for (image, _), expected in zip(samples, pixels, strict=True):
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), expected)


def test_shards_are_plain_ustar_without_time_or_owner(packed: Path) -> None:
    with tarfile.open(packed / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] in (
        ["00000000.jpg", "00000000.cls"],
        ["00000000.png", "00000000.cls"],
    )
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.mode, member.type) == (0, 0, 0, 0o444, b"0")
    listed = subprocess.run(["tar", "tf", packed / "shard-000000.tar"], check=True, capture_output=True, text=True)
    assert listed.stderr == ""
    assert listed.stdout.split() == [member.name for member in members]


def test_digits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    manifest = pack("digits", tmp_path / "digits", size=32, mode="RGB", resize="box", limit=5)
    assert manifest.facts == {"resolution": 32, "channels": 3, "classes": 10}
    assert manifest.class_counts == [5] * 10
    assert (manifest.packing.size, manifest.packing.resize, manifest.packing.mode) == (32, "box", "RGB")
    with ShardedDataset.open(tmp_path / "digits") as dataset:
        images, labels = dataset.read(np.arange(50)), dataset.labels
    target = datasets.load_digits()
    chosen = [row for label in range(10) for row in np.flatnonzero(target.target == label)[:5]]
    # A box filter that enlarges four times repeats pixels.
    expected = {
        (int(target.target[row]), np.rint(target.images[row] * 255 / 16).astype(np.uint8).tobytes()) for row in chosen
    }
    assert {(int(label), image[0, ::4, ::4].tobytes()) for image, label in zip(images, labels, strict=True)} == expected
    assert (images[:, 0] == images[:, 1]).all()


def test_limit_takes_the_first_of_each_class(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "set", limit=3)
    stored = {data for name, data in members_of(tmp_path / "set") if not name.endswith(".cls")}
    assert stored == {path.read_bytes() for path in tree.rglob("0[012].*")}


def members_of(folder: Path) -> list[tuple[str, bytes]]:
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return found


def test_progress_counts_to_the_end(tree: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    pack(tree, tmp_path / "set", progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, None)
    assert calls[-1] == (60, 60)


# What a person can get wrong


def refusal(source: Path | str, tmp_path: Path, **options: object) -> str:
    with pytest.raises(DataError) as error:
        pack(source, tmp_path / "set", **options)  # type: ignore[arg-type]
    assert not [path for path in tmp_path.iterdir() if "set" in path.name], "something was left behind"
    return str(error.value)


def test_text_and_truncated_files_are_all_named(source: Path, tmp_path: Path) -> None:
    (source / "class0" / "text.jpg").write_text("hello")
    (source / "class0" / "empty.png").write_bytes(b"")
    for name in ("class0/00.jpg", "class1/01.png"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[: len(data) // 2])
    message = refusal(source, tmp_path)
    assert "4 of 10 images cannot be used" in message
    assert "class0/text.jpg: not an image: it starts with b'hello'" in message
    assert "class0/empty.png: the file is empty" in message
    assert "class0/00.jpg: damaged JPEG" in message
    assert "class1/01.png: " in message
    assert "remove these files" in message


def test_many_offenders_are_counted_and_some_named(source: Path, tmp_path: Path) -> None:
    for number in range(40):
        (source / "class1" / f"bad{number}.jpg").write_text("x")
    message = refusal(source, tmp_path)
    assert "40 of 48 images cannot be used" in message
    assert "... and 35 more" in message
    assert len(message.splitlines()) < 20


def test_mixed_sizes_need_a_size(source: Path, tmp_path: Path, draw: Draw, encode: Encode) -> None:
    (source / "class0" / "big.png").write_bytes(encode(draw(1, (48, 32))))
    message = refusal(source, tmp_path)
    assert "8 16x16: " in message
    assert "1 48x32: class0/big.png" in message
    assert "--size 16" in message
    assert pack(source, tmp_path / "set", size=16).resolution == 16


def test_equal_images_that_are_not_square_need_a_size(tmp_path: Path, draw: Draw, encode: Encode) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / "flat" / f"{number}.png").write_bytes(encode(draw(number, (24, 16))))
    message = refusal(tmp_path / "flat", tmp_path)
    assert "3 24x16" in message
    assert "--size 16" in message


def test_a_grey_and_an_rgba_image_among_rgb_need_a_mode(
    source: Path, tmp_path: Path, draw: Draw, encode: Encode
) -> None:
    (source / "class0" / "grey.png").write_bytes(encode(draw(1, mode="L")))
    (source / "class1" / "alpha.png").write_bytes(encode(draw(2, mode="RGBA")))
    message = refusal(source, tmp_path)
    assert "8 RGB: " in message
    assert "1 L: class0/grey.png" in message
    assert "1 RGBA: class1/alpha.png" in message
    assert "--mode RGB" in message
    manifest = pack(source, tmp_path / "set", mode="RGB")
    assert (manifest.channels, manifest.packing.passed_through) == (3, 8)


def test_all_kinds_of_faults_are_told_at_once(source: Path, tmp_path: Path, draw: Draw, encode: Encode) -> None:
    (source / "class0" / "text.jpg").write_text("hello")
    (source / "class0" / "grey.png").write_bytes(encode(draw(1, (8, 8), "L")))
    message = refusal(source, tmp_path)
    for part in ("text.jpg", "--mode RGB", "--size 8"):
        assert part in message


def test_a_uniform_set_of_another_mode_needs_a_mode(tmp_path: Path, draw: Draw, encode: Encode) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(encode(draw(1).quantize(16)))
    assert "1 P: 1.png" in refusal(tmp_path / "flat", tmp_path)


def test_empty_folder_and_unknown_archive(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(tmp_path / "empty", tmp_path)
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    assert "unknown archive type" in refusal(tmp_path / "x.rar", tmp_path)


@pytest.mark.parametrize(("option", "value"), [("size", 0), ("limit", -1), ("shard_bytes", 0)])
def test_numbers_below_one(option: str, value: int, source: Path, tmp_path: Path) -> None:
    assert f"{option} is {value}" in refusal(source, tmp_path, **{option: value})


def test_names_of_filters_and_modes() -> None:
    assert (resize_named("Box"), mode_named("rgb"), mode_named("L"), mode_named(None)) == ("box", "RGB", "L", None)
    with pytest.raises(DataError, match="'cubic' is unknown; choose one of none, lanczos, box, bicubic"):
        resize_named("cubic")
    with pytest.raises(DataError, match="'RGBA' is unknown; choose RGB"):
        mode_named("RGBA")


# The destination


def test_an_existing_data_set_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "set"
    first = pack(source, destination)
    before = files_of(destination)
    with pytest.raises(DataError, match=r"exists; .* --overwrite"):
        pack(source, destination, size=8)
    assert files_of(destination) == before
    (source / "class0" / "bad.jpg").write_text("x")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        pack(source, destination, size=8, overwrite=True)
    assert files_of(destination) == before
    (source / "class0" / "bad.jpg").unlink()
    second = pack(source, destination, size=8, overwrite=True)
    assert second.hash != first.hash
    assert Manifest.load(destination) == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


def test_foreign_folders_and_files_are_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DataError, match="never deleted"):
        pack(source, tmp_path / "thesis", overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        pack(source, tmp_path / "file", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "new").mkdir()
    assert pack(source, tmp_path / "new").samples == 8


def test_a_place_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made: File exists; choose a place where you may write"):
        pack(source, tmp_path / "file" / "set")


@pytest.mark.multiprocess
def test_workers_tell_faults_as_one_process_does(source: Path, tmp_path: Path) -> None:
    for number in range(9):
        (source / "class1" / f"bad{number}.jpg").write_text("x")
    messages = {refusal(source, tmp_path, shard_bytes=4096, workers=workers) for workers in (1, 2)}
    assert len(messages) == 1
    assert "9 of 17 images cannot be used" in messages.pop()
