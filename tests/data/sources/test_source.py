import zipfile
from pathlib import Path

import numpy as np
import pytest

from bessemer.data.sources.source import Source, open_source
from bessemer.errors import DataError


def listing(tmp_path: Path, *names: str, split: str | None = None) -> Source:
    """The source of a zip with empty files of these names."""
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    with open_source(path, spool_folder=tmp_path, split=split) as source:
        assert all(source.files.read(entry.path) == str(entry.path).encode() for entry in source.entries)
        return source


def pairs(source: Source) -> list[tuple[str, str]]:
    return [(entry.class_name, entry.key) for entry in source.entries]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("b/2.jpg", "a/1.PNG", "b/1.jpeg"), [("a", "1.PNG"), ("b", "1.jpeg"), ("b", "2.jpg")]),
        (("x.jpg", "y.webp"), [("all", "x.jpg"), ("all", "y.webp")]),
        (("cats/x.jpg",), [("cats", "x.jpg")]),
        (("set/a/1.jpg", "set/b/1.jpg"), [("a", "1.jpg"), ("b", "1.jpg")]),
        (("up/set/a/1.jpg", "up/set/b/1.jpg"), [("a", "1.jpg"), ("b", "1.jpg")]),
        (("a/sub/1.jpg", "a/2.jpg", "b/1.jpg"), [("a", "2.jpg"), ("a", "sub/1.jpg"), ("b", "1.jpg")]),
        (("train/x.jpg",), [("all", "x.jpg")]),
    ],
)
def test_layouts(names: tuple[str, ...], expected: list[tuple[str, str]], tmp_path: Path) -> None:
    source = listing(tmp_path, *names)
    assert pairs(source) == expected


SPLIT = ("train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg")


def test_the_training_split_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    source = listing(tmp_path, *SPLIT)
    assert (source.split, source.splits) == ("train", ["test", "train"])
    assert pairs(source) == [("a", "1.jpg"), ("b", "1.jpg")]
    assert pairs(listing(tmp_path, *SPLIT, split="test")) == [("a", "1.jpg")]
    assert pairs(listing(tmp_path, *SPLIT, split="all")) == [
        ("a", "test-1.jpg"),
        ("a", "train-1.jpg"),
        ("b", "train-1.jpg"),
    ]
    assert listing(tmp_path, *(f"up/{name}" for name in SPLIT)).split == "train"
    assert listing(tmp_path, "test/a/1.jpg").split == "test"
    assert listing(tmp_path, "train/a/1.jpg", "other/a/1.jpg").split is None


def test_split_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--split val: .* has the splits test, train; choose one of them, or all"):
        listing(tmp_path, *SPLIT, split="val")
    with pytest.raises(DataError, match=r"--split train: .* has no splits; its top folders are a, b"):
        listing(tmp_path, "a/1.jpg", "b/1.jpg", split="train")
    with pytest.raises(DataError, match=r"has the splits test, val; choose: --split test, or --split all"):
        listing(tmp_path, "test/a/1.jpg", "val/a/1.jpg")


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 images beside its class folders \(x\.jpg, y\.jpg; folders a\); move them"):
        listing(tmp_path, "x.jpg", "y.jpg", "a/1.jpg")


def test_no_images_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds no images: .*\.jpg.* 2 \.txt, 1 \.psd found; put them in as class/name"
    ):
        listing(tmp_path, "a/1.txt", "b/2.TXT", "c/3.psd")
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(DataError, match=r"empty holds no images: .* nothing found"),
        open_source(tmp_path / "empty", spool_folder=tmp_path),
    ):
        pass


def test_other_files_are_counted(tmp_path: Path) -> None:
    names = ("a/1.jpg", "README", "a/list.csv", "b/list.csv", "a/.DS_Store", "__MACOSX/a/._1.jpg", ".cache/a/2.jpg")
    source = listing(tmp_path, *names)
    assert pairs(source) == [("a", "1.jpg")]
    assert source.ignored == {".csv": 2, "hidden": 3, "no ending": 1}


def test_unprintable_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'a\\n/1\.jpg' has characters that cannot be shown"):
        listing(tmp_path, "a\n/1.jpg", "b/1.jpg")


def test_nothing_there(tmp_path: Path) -> None:
    with (
        pytest.raises(
            DataError, match=r"nowhere does not exist; a source is a folder or archive of images, .* or the word digits"
        ),
        open_source(tmp_path / "nowhere", spool_folder=tmp_path),
    ):
        pass


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    with open_source("digits", spool_folder=tmp_path) as source:
        assert len(source.entries) == 1797
        assert sorted({entry.class_name for entry in source.entries}) == [str(label) for label in range(10)]
        for entry in source.entries[::100]:
            row = int(entry.path.stem)
            pixels = source.files.read(entry.path)
            assert isinstance(pixels, np.ndarray)
            image = pixels[..., 0]
            assert image.dtype == np.uint8
            assert int(entry.class_name) == digits.target[row]
            assert np.array_equal(np.rint(image * (16 / 255)), digits.images[row])
