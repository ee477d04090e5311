import contextlib
import json
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.sources.labels import class_order, match_labels, parse_labels
from bessemer.errors import DataError


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("dataset.json", '{"labels": [["a/1.png", 0], ["b.png", 10]]}'),
        ("l.json", '{"a/1.png": 0, "b.png": "10"}'),
        ("l.json", '[["a/1.png", "0"], ["b.png", "10"]]'),
        ("l.csv", "a/1.png,0\nb.png,10\n"),
        ("l.csv", "\ufefffile,label\r\na/1.png,0\r\n\r\nb.png,10\r\n"),
        ("l.csv", 'id,width,class\n"a/1.png",3,0\nb.png,3, 10 \n'),
    ],
)
def test_forms(name: str, data: str) -> None:
    assert parse_labels(name, data.encode()) == {"a/1.png": "0", "b.png": "10"}


def test_stylegan_says_null_where_there_are_no_labels() -> None:
    assert parse_labels("dataset.json", b'{"labels": null}') is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.json", "{", "l.json is no JSON"),
        ("l.json", '{"labels": [["a.png", 1.5]]}', r"l\.json: \['a.png', 1\.5\] is no label"),
        ("l.json", '{"labels": [["a.png", true]]}', "True.* is no label"),
        ("l.json", '{"labels": 3}', "3 is no label"),
        ("l.json", '[["a.png", 1], ["a.png", 2]]', "'a.png' has two classes, 1 and 2"),
        ("l.json", '{"a.png": ""}', "'a.png' has the class ''"),
        ("l.csv", "a.png\n", r"the row \['a\.png'\] has 1 cells"),
        ("l.csv", "\xff\xfe", "UTF-8"),
    ],
)
def test_faults(name: str, data: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_labels(name, data.encode("latin-1"))


def paths(*names: str) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in names]


def test_names_are_relative_to_the_label_file_or_the_source() -> None:
    images = paths("set/00/1.png", "set/2.png", "set/3.png")
    labels = {"00/1.png": "a", "set/2.png": "b", "3": "c"}
    found = match_labels("dataset.json", labels, PurePosixPath("set"), images)
    assert found == dict(zip(images, "abc", strict=True))


def test_images_without_a_label_are_named() -> None:
    with pytest.raises(DataError, match=r"l\.csv has no label for 2 of 3 images: b\.png, c\.png; .* such as 'a\.png'"):
        match_labels("l.csv", {"a.png": "1"}, PurePosixPath(), paths("c.png", "b.png", "a.png"))


def test_numbers_are_ordered_as_numbers() -> None:
    assert class_order(["10", "9", "0"]) == ["0", "9", "10"]
    assert class_order(["b", "a10", "a9"]) == ["a10", "a9", "b"]
    assert class_order(["01", "1", "2"]) == ["01", "1", "2"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("labels"), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["l.csv", "l.json"]), st.binary() | json_values.map(json.dumps).map(str.encode))
def test_any_bytes_are_labels_or_a_data_error(name: str, data: bytes) -> None:
    with contextlib.suppress(DataError):
        found = parse_labels(name, data)
        assert found is None or all(label and label.isprintable() for label in found.values())
