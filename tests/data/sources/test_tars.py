import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bessemer.data.sources.tars import Member, read_members
from bessemer.errors import DataError

FILES = {
    "0001.jpg": b"a" * 700,
    "0001.cls": b"3",
    "0002.jpg": b"b" * 512,
    "0002.cls": b"",
    f"{'n' * 120}.jpg": b"c" * 9,
}
STYLES = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(files: dict[str, bytes], style: int = tarfile.PAX_FORMAT, mtime: float = 0) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=style) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def members(data: bytes, folder: Path) -> list[Member]:
    (folder / "x.tar").write_bytes(data)
    return list(read_members(folder / "x.tar"))


@pytest.mark.parametrize("style", ["gnu", "pax"])
def test_members_are_those_of_tarfile(style: str, tmp_path: Path) -> None:
    data = tar_of({**FILES, "ü/" * 90 + "x": b"long"}, STYLES[style], mtime=1.5 if style == "pax" else 1)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [Member(member.name, member.offset_data, member.size, "file") for member in tar]
    assert members(data, tmp_path) == expected


def test_folders_links_and_numbers_beyond_octal(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link"), (tarfile.REGTYPE, "file")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime, info.uid = kind, "/etc/passwd", 1 << 40, 1 << 40
            tar.addfile(info)
    assert [(member.name, member.kind) for member in members(file.getvalue(), tmp_path)] == [
        ("folder/", "folder"),
        ("link", "other"),
        ("file", "file"),
    ]


SMALL = {"1.jpg": b"a" * 700, "1.cls": b"3", "2.jpg": b"b" * 512, "2.cls": b"4"}
# Headers of ustar members: at 0, 1536, 2560, 3584; the end is at 4608.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:1536], r"byte 1536, after '1\.jpg': the file ends there without the blocks of zeros"),
        (lambda d: d[:1600], r"byte 1536, after '1\.jpg': the file ends there within a header \(64 of 512 bytes\)"),
        (lambda d: d[:1000], r"byte 0, at its start: its member '1\.jpg' needs bytes 512 to 1212, the file has 1000"),
        (lambda d: d[:1300], r"byte 1536, after '1\.jpg': the file ends there"),
        (
            lambda d: d[:2560] + bytes(512) + d[3072:],
            r"byte 2560, after '1\.cls': .*, but data follows them at byte 3072",
        ),
        (lambda d: d[: 1536 + 5] + b"X" + d[1536 + 6 :], r"byte 1536, .* damaged: its checksum is \d+, should be \d+"),
        (lambda d: d[:-512] + b"x" * 512, r"byte 4608, after '2\.cls': .*, but data follows them at byte \d+"),
        (lambda d: b"", r"byte 0, at its start: the file ends there without"),
    ],
    ids=[
        "at a boundary",
        "in a header",
        "in a payload",
        "in padding",
        "zeroed header",
        "flipped byte",
        "tail",
        "empty",
    ],
)
def test_every_loss_is_an_error_that_says_where(change: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        members(change(tar_of(SMALL, tarfile.USTAR_FORMAT)), tmp_path)  # type: ignore[operator]
    assert "copy it again" in str(error.value)


def test_no_flipped_bit_of_a_header_goes_unseen(tmp_path: Path) -> None:
    data = tar_of(SMALL, tarfile.USTAR_FORMAT)
    sound = members(data, tmp_path)
    for place in [*range(1536, 2048, 5), *range(1536 + 148, 1536 + 156)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        try:
            found = members(bytes(flipped), tmp_path)
        except DataError:
            continue
        assert found == sound, place  # the space after the checksum may become a zero


@pytest.mark.parametrize("style", STYLES)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=12)), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_is_a_data_error_or_members_within_the_file(
    style: str, changes: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    files = SMALL if style == "ustar" else FILES
    data = bytearray(tar_of(files, STYLES[style]))
    for place, value in changes:
        place %= len(data)
        data[place : place + len(value)] = value
        _mend_checksum(data, place // 512 * 512)
    try:
        found = members(bytes(data), tmp_path)
    except DataError:
        return
    assert all(0 < member.offset <= member.offset + member.size <= len(data) for member in found)


def _mend_checksum(data: bytearray, block: int) -> None:
    """Let what is wrong in a header reach the parser behind the checksum."""
    if b"ustar" in data[block : block + 512]:
        data[block + 148 : block + 156] = b" " * 8
        data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])


@given(data=st.binary(max_size=1400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_are_a_tar(data: bytes, tmp_path: Path) -> None:
    if data.strip(b"\0"):
        with pytest.raises(DataError):
            members(data, tmp_path)
