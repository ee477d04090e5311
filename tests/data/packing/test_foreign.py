"""Shards of others are indexed whole or refused; a copy that differs in a byte is found out."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bessemer.data.manifest import Manifest
from bessemer.data.packing.foreign import index_shards
from bessemer.data.packing.verify import Fault, verify
from bessemer.data.reading.dataset import ShardedDataset
from bessemer.errors import DataError

Draw = Callable[..., Image.Image]
Encode = Callable[..., bytes]
Content = list[tuple[str, bytes]]


def write_tar(path: Path, content: Content) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def contents(draw: Draw, encode: Encode) -> list[Content]:
    """Two shards of four samples, as others write them: keys with folders, captions, labels with gaps."""
    return [
        [
            member
            for number in range(4 * shard, 4 * shard + 4)
            for member in (
                (f"part{shard}/s{number}.txt", b"a caption"),
                (f"part{shard}/s{number}.jpeg", encode(draw(number), "JPEG")),
                (f"part{shard}/s{number}.cls", b"%d\n" % (0, 10, 2)[number % 3]),
            )
        ]
        for shard in range(2)
    ]


@pytest.fixture
def shards(contents: list[Content], tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, content in enumerate(contents):
        write_tar(folder / f"{number}.tar", content)
    return folder


def test_an_indexed_set_reads_like_its_shards(shards: Path, contents: list[Content]) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    manifest = index_shards(shards)
    assert manifest == Manifest.load(shards)
    assert (manifest.classes, manifest.class_counts, manifest.encoding) == (["0", "2", "10"], [3, 2, 3], "jpg")
    assert (manifest.packing.labels, manifest.packing.ignored) == (".cls", {".txt": 8})
    members = [member for content in contents for member in content]
    with ShardedDataset.open(shards, verify="sha256") as dataset:
        labels = [int(manifest.classes[label]) for label in dataset.labels]
        images = dataset.read(np.arange(8))
    assert labels == [int(data) for name, data in members if name.endswith(".cls")]
    for image, data in zip(images, [data for name, data in members if name.endswith(".jpeg")], strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1))
    assert {name: (shards / name).read_bytes() for name in before} == before
    assert verify(shards, deep=True) == []


def test_a_packed_set_indexed_anew_has_the_same_index(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in packed.glob("*.tar"):
        shutil.copy(path, folder)
    index_shards(folder)
    assert (folder / "index.npy").read_bytes() == (packed / "index.npy").read_bytes()


@pytest.mark.multiprocess
def test_workers_find_the_same(shards: Path) -> None:
    assert index_shards(shards, overwrite=True, workers=2) == index_shards(shards, overwrite=True)


def test_what_is_there_is_kept(shards: Path, tmp_path: Path) -> None:
    index_shards(shards)
    with pytest.raises(DataError, match="has a manifest already; check it with `bessemer data verify"):
        index_shards(shards)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no shards"):
        index_shards(tmp_path / "empty")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def header(data: bytes, number: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut at a member": (lambda d: d[: header(d, 6)], r"after 'part1/s5\.cls': the file ends there without"),
    "cut in a header": (lambda d: d[: header(d, 6) + 90], r"the file ends there within a header"),
    "cut in a payload": (lambda d: d[: header(d, 7) + 700], r"needs bytes \d+ to \d+, the file has"),
    "flipped header byte": (lambda d: flipped(d, header(d, 6) + 3), r"the header there is damaged: its checksum"),
    "zeroed header": (lambda d: d[: header(d, 6)] + bytes(512) + d[header(d, 6) + 512 :], r"data follows them at byte"),
    "zeroed image": (
        lambda d: d[: header(d, 7) + 512] + bytes(512) + d[header(d, 7) + 1024 :],
        r"sample 'part1/s6' at byte \d+: not an image",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_named_by_index_and_by_verify(name: str, shards: Path) -> None:
    change, message = DAMAGE[name]
    index_shards(shards)
    path = shards / "1.tar"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        index_shards(shards, overwrite=True)
    assert "1.tar" in str(error.value)
    assert "0.tar" not in str(error.value)
    (fault,) = verify(shards)
    assert fault.file == "1.tar"
    deep = verify(shards, deep=True)
    assert fault in deep
    assert {found.file for found in deep} == {"1.tar"}
    assert any("sample" in found.problem or "byte" in found.problem for found in deep if found != fault)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: [m for m in c if m[0] != "part1/s5.jpeg"],
            r"sample 'part1/s5' at byte \d+ has 0 images \(\.txt, \.cls\)",
        ),
        (lambda c: [m for m in c if m[0] != "part1/s5.cls"], r"1\.tar: there are samples without a label"),
        (lambda c: [*c, ("part1/s4.json", b"{}")], r"'part1/s4' .* the files of a sample lie together"),
        (lambda c: [c[0], c[1], *c[1:]], r"has two files with the same ending \(\.txt, \.jpeg, \.jpeg, \.cls\)"),
        (lambda c: [*c[:1], ("part1/s4.png", b"x"), *c[1:]], r"has 2 images \(\.txt, \.png, \.jpeg, \.cls\)"),
        (lambda c: [*c[:2], ("part1/s4.cls", b"cat"), *c[3:]], r"its label is 'cat', which is no number"),
        (lambda c: [*c[:2], ("part1/s4.cls", b"\xff"), *c[3:]], r"sample 'part1/s4' at byte \d+"),
        (lambda c: [], r"1\.tar has no samples"),
    ],
)
def test_wrong_samples_are_named(
    change: Callable[[Content], Content], message: str, shards: Path, contents: list[Content]
) -> None:
    write_tar(shards / "1.tar", change(contents[1]))
    with pytest.raises(DataError, match=message):
        index_shards(shards)
    assert sorted(path.name for path in shards.iterdir()) == ["0.tar", "1.tar"]


def test_images_that_do_not_fit_are_told_to_be_packed(shards: Path, draw: Draw, encode: Encode) -> None:
    write_tar(shards / "1.tar", [("a.png", encode(draw(1, (12, 8)))), ("a.cls", b"1")])
    with pytest.raises(DataError, match=r"(?s)sizes differ.*1 12x8: 1\.tar/a.*pack them: bessemer data pack"):
        index_shards(shards)
    write_tar(shards / "1.tar", [("a.webp", encode(draw(1), "WEBP")), ("a.cls", b"1")])
    with pytest.raises(DataError, match="only JPEG and PNG"):
        index_shards(shards)


def test_links_are_refused(shards: Path) -> None:
    with tarfile.open(shards / "1.tar", "a") as tar:
        info = tarfile.TarInfo("z.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"'z' .* is a link"):
        index_shards(shards)


# Verifying


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def test_a_true_copy(copy: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    assert verify(copy, deep=True, progress=lambda done, total: calls.append((done, total))) == []
    assert calls[-1] == (len(Manifest.load(copy).shards),) * 2


def test_missing_short_and_stray_files(copy: Path) -> None:
    (copy / "shard-000000.tar").unlink()
    path = copy / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    (copy / "shard-999999.tar").write_bytes(b"x")
    index = copy / "index.npy"
    index.write_bytes(flipped(index.read_bytes(), index.stat().st_size - 1))
    found = {fault.file: fault.problem for fault in verify(copy)}
    assert list(found) == ["index.npy", "shard-000000.tar", "shard-000001.tar", "shard-999999.tar"]
    assert found["shard-000000.tar"] == "it is missing"
    assert "bytes instead of" in found["shard-000001.tar"]
    assert "sha256" in found["index.npy"]
    assert "not in the manifest" in found["shard-999999.tar"]


@given(place=st.integers(0, 1 << 30), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_no_flipped_bit_goes_unseen_and_deep_never_fails(place: int, bit: int, copy: Path, packed: Path) -> None:
    files = sorted(path for path in packed.iterdir() if path.name != "manifest.json")
    file = files[place % len(files)]
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << bit
    target = copy / file.name
    target.write_bytes(data)
    try:
        assert {fault.file for fault in verify(copy)} == {file.name}
        assert {fault.file for fault in verify(copy, deep=True)} == {file.name}
    finally:
        shutil.copy(file, target)


def test_deep_names_the_samples(copy: Path) -> None:
    path = copy / "shard-000000.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        image, label = tar.getmembers()[2:4]
    path.write_bytes(flipped(data, image.offset_data + image.size // 2))
    problems = [fault.problem for fault in verify(copy, deep=True)]
    assert f"sample 00000001 at byte {image.offset_data}: its bytes changed since it was packed (crc32)" in problems
    path.write_bytes(flipped(data, label.offset_data))
    changed = [fault.problem for fault in verify(copy, deep=True) if "has the label" in fault.problem]
    assert len(changed) == 1
    assert f"sample 00000001 at byte {image.offset_data}" in changed[0]


def test_deep_names_samples_that_the_index_does_not_know(copy: Path) -> None:
    manifest = Manifest.load(copy)
    other = copy / manifest.shards[0].name
    write_tar(other, [("x.txt", b"words"), ("x.png", b"no image"), ("x.cls", b"0")])
    problems = [fault.problem for fault in verify(copy, deep=True) if fault.file == other.name]
    assert any("is not in the index" in problem for problem in problems)
    assert Fault(other.name, f"it has {other.stat().st_size} bytes instead of {manifest.shards[0].bytes}") in verify(
        copy
    )
