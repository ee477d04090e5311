import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bessemer.data.sources.archives import Files, FolderFiles, open_archive
from bessemer.errors import DataError

CONTENT = {f"class{n % 3}/{n:03d}.jpg": bytes([n]) * (37 * n) for n in range(40)}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
TYPES = [*COMPRESS, "zip"]


def tar_bytes(content: dict[str, bytes], style: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=style) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def archive_bytes(kind: str, content: dict[str, bytes] = CONTENT) -> bytes:
    if kind != "zip":
        return COMPRESS[kind](tar_bytes(content))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


def content_of(files: Files) -> dict[str, bytes]:
    try:
        return {str(path): files.read(path) for path in files.paths}
    finally:
        files.close()


def read(data: bytes, folder: Path) -> dict[str, bytes]:
    (folder / "archive").write_bytes(data)  # the name says nothing: types are told by content
    return content_of(open_archive(folder / "archive", folder))


@pytest.mark.parametrize("kind", TYPES)
def test_all_types_hold_the_same_files(kind: str, tmp_path: Path) -> None:
    assert read(archive_bytes(kind), tmp_path) == CONTENT
    spools = [path.name for path in tmp_path.iterdir() if path.name != "archive"]
    assert len(spools) == (kind not in ("tar", "zip"))


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_dialects_and_long_names(style: int, tmp_path: Path) -> None:
    long = {f"{'d' * 90}/{'f' * 90}.jpg": b"1", "x.jpg": b""}
    assert read(tar_bytes(long, style), tmp_path) == long


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.bz2", "tar.zst"])
def test_compressed_parts_end_to_end(kind: str, tmp_path: Path) -> None:
    plain = tar_bytes(CONTENT)
    parts = [COMPRESS[kind](plain[start : start + 10_000]) for start in range(0, len(plain), 10_000)]
    assert read(b"".join(parts), tmp_path) == CONTENT


@pytest.mark.parametrize("kind", TYPES)
def test_every_cut_is_found(kind: str, tmp_path: Path) -> None:
    data = archive_bytes(kind)
    # A tar that ends within its last zeros has lost nothing.
    last = tarfile_end(data) if kind == "tar" else len(data)
    cuts = {*range(1024, last, max(512, last // 40 // 512 * 512)), *range(600, last, max(1, last // 40)), last - 1}
    for length in sorted(cut for cut in cuts if cut < last):
        with pytest.raises(DataError, match="archive"):
            read(data[:length], tmp_path)


def tarfile_end(data: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512 + 512


def test_a_damaged_tar_header_loses_nothing_in_silence(tmp_path: Path) -> None:
    data = tar_bytes(CONTENT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar]
    for offset in headers:
        flipped = bytearray(data)
        flipped[offset + 124] ^= 1  # the length of the file
        zeroed = bytearray(data)
        zeroed[offset : offset + 512] = bytes(512)
        for damaged in (flipped, zeroed):
            with pytest.raises(DataError):
                read(bytes(damaged), tmp_path)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.zst", "tar.bz2"])
def test_a_flipped_byte_in_compressed_data_is_found(kind: str, tmp_path: Path) -> None:
    data = archive_bytes(kind)
    for place in range(len(data) // 4, len(data) * 3 // 4, max(1, len(data) // 20)):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        with pytest.raises(DataError, match="damaged"):
            read(bytes(damaged), tmp_path)


def test_a_damaged_zip_member_is_a_value_error(tmp_path: Path) -> None:
    data = bytearray(archive_bytes("zip", {"a/1.jpg": bytes(range(256)) * 8, "a/2.jpg": b"sound"}))
    data[60] ^= 0xFF
    (tmp_path / "archive").write_bytes(data)
    files = open_archive(tmp_path / "archive", tmp_path)
    with pytest.raises(ValueError):
        files.read(PurePosixPath("a/1.jpg"))
    assert files.read(PurePosixPath("a/2.jpg")) == b"sound"
    files.close()


@pytest.mark.parametrize("kind", ["tar", "tar.xz", "zip"])
@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg"])
def test_paths_out_of_the_archive_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(DataError, match=r"leads out of the archive"):
        read(archive_bytes(kind, {name: b"x"}), inner)
    names = {path.name for path in tmp_path.rglob("*")} | {path.name for path in Path("/tmp").glob("evil*")}
    assert not [one for one in names if "evil" in one]


def test_links_are_counted_and_the_last_of_equal_names_counts(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for data in (b"old", b"new!"):
            info = tarfile.TarInfo("./a/1.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a/link.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    files = open_archive(tmp_path / "x.tar", tmp_path)
    assert files.links == 2
    assert content_of(files) == {"a/1.jpg": b"new!"}


@pytest.mark.parametrize("start", [b"", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"hello"])
def test_unknown_types_name_the_known_ones(start: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown archive type .* \.tar\.zst, .*\.zip archive, .* or the word digits"):
        read(start, tmp_path)


def test_folders_follow_links_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(folder.name.encode())
    (root / "b").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    files = FolderFiles.below(root)
    assert sorted(str(path) for path in files.paths) == ["a/1.jpg", "b/1.jpg", "gone.jpg"]
    assert files.read(PurePosixPath("b/1.jpg")) == b"outside"
    with pytest.raises(ValueError, match="cannot be read"):
        files.read(PurePosixPath("gone.jpg"))


SMALL = {"a/1.jpg": b"one", f"{'long' * 40}/ü.jpg": b"two" * 400}
changes = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", ["pax", "gnu", "zip"])
@given(changes=changes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_is_a_data_error_or_a_readable_archive(
    kind: str, changes: list[tuple[int, int]], tmp_path: Path
) -> None:
    styles = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
    data = bytearray(archive_bytes("zip", SMALL) if kind == "zip" else tar_bytes(SMALL, styles[kind]))
    for place, value in changes:
        data[place % len(data)] = value
    (tmp_path / "archive").write_bytes(data)
    try:
        files = open_archive(tmp_path / "archive", tmp_path)
    except DataError:
        return
    for path in files.paths:
        with contextlib.suppress(ValueError):
            assert isinstance(files.read(path), bytes)
    files.close()
