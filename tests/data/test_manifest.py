import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.manifest import Manifest, data_hash
from bessemer.errors import DataError


def fields(**changes: Any) -> dict[str, Any]:
    """Content of a sound manifest with changes, and the hash that belongs to them."""
    content: dict[str, Any] = {
        "version": 1,
        "resolution": 16,
        "channels": 3,
        "encoding": "jpg",
        "classes": ["cat", "dog"],
        "class_counts": [2, 3],
        "samples": 5,
        "packing": {
            "source": "pets",
            "size": 16,
            "resize": "lanczos",
            "mode": None,
            "split": None,
            "splits": [],
            "limit": None,
            "passed_through": 5,
            "ignored": {".txt": 1},
        },
        "index": {"name": "index.npy", "bytes": 228, "sha256": "a" * 64},
        "shards": [
            {"name": "shard-000000.tar", "bytes": 8192, "sha256": "b" * 64, "samples": 3},
            {"name": "shard-000001.tar", "bytes": 4096, "sha256": "c" * 64, "samples": 2},
        ],
    }
    content |= changes
    return {"hash": data_hash(content), **content}


def parse(content: object) -> Manifest:
    return Manifest.parse(json.dumps(content).encode(), "set/manifest.json")


def test_round_trip(tmp_path: Path) -> None:
    manifest = parse(fields())
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest.facts == {"resolution": 16, "channels": 3, "classes": 2}


def test_the_hash_is_of_the_data_and_not_of_where_it_came_from() -> None:
    first = fields()
    moved = fields(packing={**first["packing"], "source": "/elsewhere/pets", "split": "train"})
    assert moved["hash"] == first["hash"]
    assert fields(packing={**first["packing"], "resize": "box"})["hash"] != first["hash"]
    assert fields(classes=["cat", "cow"])["hash"] != first["hash"]
    other = [{**first["shards"][0], "sha256": "d" * 64}, first["shards"][1]]
    assert fields(shards=other)["hash"] != first["hash"]


def test_sets_of_images_are_written_and_hashed_as_before_there_were_other_kinds(tmp_path: Path) -> None:
    content = fields()
    rules = {key: content["packing"][key] for key in ("size", "resize", "mode")}
    hashed = {key: value for key, value in content.items() if key != "hash"} | {"packing": rules}
    assert content["hash"] == hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    parse(content).save(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_bytes())
    assert written.keys() == content.keys()
    assert written["hash"] == content["hash"]


def of_kind(kind: str, *declared: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A sound manifest of another kind."""
    plain = {key: value for key, value in fields().items() if key not in ("hash", "resolution", "channels", "encoding")}
    content = {**plain, "kind": kind, "fields": [{"rate": None, **one} for one in declared], **changes}
    return {"hash": data_hash(content), **content}


IMAGES = {"name": "images", "shape": [3, 16, 16], "encoding": "jpg"}
TARGETS = {"name": "targets", "shape": [1, 16, 16], "encoding": "png"}
OTHERS = {"name": "others", "shape": [3, 16, 16], "encoding": "jpg"}
CLIPS = {"name": "clips", "shape": [4, 3, 16, 16], "encoding": "jpg"}
AUDIO = {"name": "audio", "shape": [100], "encoding": "wav", "rate": 8000}
BITS = {"name": "bits", "shape": [21], "encoding": "npy"}


@pytest.mark.parametrize(
    ("kind", "declared", "members", "decoded"),
    [
        ("pairs", [IMAGES, TARGETS], 2, 4 * 256),
        ("clips", [CLIPS], 4, 4 * 3 * 256),
        ("audio", [AUDIO], 1, 200),
        ("bits", [BITS], 1, 3),
    ],
)
def test_other_kinds_declare_their_fields(
    kind: str, declared: list[dict[str, Any]], members: int, decoded: int, tmp_path: Path
) -> None:
    manifest = parse(of_kind(kind, *declared))
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [(one.name, one.shape) for one in manifest.batch_fields] == [(one["name"], one["shape"]) for one in declared]
    assert (manifest.members, manifest.decoded_bytes) == (members, 5 * decoded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (of_kind("pairs", IMAGES), "a data set of pairs has the fields images, targets .*; there are images"),
        (of_kind("pairs", IMAGES, {**TARGETS, "shape": [1, 8, 8]}), "its fields differ in size"),
        (of_kind("clips", {**CLIPS, "shape": [3, 16, 16]}), r"clips of shape \[3, 16, 16\]"),
        (of_kind("clips", {**CLIPS, "shape": [4, 2, 16, 16]}), "square, of 1 or 3 channels"),
        (of_kind("audio", {**AUDIO, "rate": None}), "sound has a rate"),
        (of_kind("bits", {**BITS, "encoding": "wav"}), r"bits of shape \[21\] as wav"),
        (of_kind("bits", BITS, channels=3), "in place of resolution, channels and encoding"),
        (of_kind("domains", IMAGES, OTHERS), "a shard holds images of both domains"),
        (of_kind("images", IMAGES), "has resolution, channels and encoding, and no fields"),
    ],
)
def test_fields_that_do_not_fit_the_kind(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(content)


def test_domains_have_shards_of_their_own() -> None:
    manifest = parse(of_kind("domains", IMAGES, OTHERS, class_counts=[3, 2]))
    assert (manifest.members, len(manifest.sample_fields), len(manifest.batch_fields)) == (1, 1, 2)


def test_edited_content_is_refused() -> None:
    with pytest.raises(DataError, match="it was edited"):
        parse({**fields(), "resolution": 32})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version: .*\(found 2\)"),
        ({"channels": 4}, r"channels: .*\(found 4\)"),
        ({"samples": "5"}, r"samples: .*\(found '5'\)"),
        ({"samples": 6}, "class_counts add up to 5, samples is 6"),
        ({"class_counts": [5]}, "2 classes with 1 counts"),
        ({"classes": ["cat", "cat"]}, "a class twice"),
        ({"class_counts": [1, 3], "samples": 4}, "the shards hold 5 samples, samples is 4"),
        ({"shards": []}, "shards: "),
        ({"extra": 1}, "extra: "),
        ({"shards": [{"name": "../x.tar", "bytes": 1, "sha256": "b" * 64, "samples": 5}]}, r"shards\.0\.name: "),
        ({"shards": [{"name": "a.tar\n", "bytes": 1, "sha256": "b" * 64, "samples": 5}]}, r"shards\.0\.name: "),
        ({"shards": [{"name": "index.npy", "bytes": 1, "sha256": "b" * 64, "samples": 5}]}, "the same name"),
    ],
)
def test_faults_name_the_field_and_the_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse(fields(**changes))
    assert "set/manifest.json" in str(error.value)
    assert "bessemer data pack" in str(error.value)


def test_what_is_no_data_set_says_how_to_pack_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; pack one: bessemer data pack SOURCE"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        Manifest.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="does not exist"):
        Manifest.load(tmp_path / "file")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        Manifest.load(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.binary(max_size=300))
def test_no_bytes_are_a_manifest(data: bytes) -> None:
    with pytest.raises(DataError):
        Manifest.parse(data, "manifest.json")


@given(st.sampled_from(sorted(fields())), json_values)
def test_any_value_in_a_field_is_a_data_error_or_sound(name: str, value: Any) -> None:
    content = {**fields(), name: value}
    try:
        manifest = parse(content)
    except DataError:
        return
    assert manifest.hash == data_hash(json.loads(manifest.model_dump_json()))


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_change_is_a_data_error_or_the_same_data(changes: list[tuple[int, int]]) -> None:
    data = bytearray(json.dumps(fields(), indent=1).encode())
    for place, value in changes:
        data[place % len(data)] = value
    try:
        manifest = Manifest.parse(bytes(data), "manifest.json")
    except DataError:
        return
    assert manifest.hash == fields()["hash"]


def test_deep_nesting_is_a_data_error() -> None:
    with pytest.raises(DataError):
        Manifest.parse(b"[" * 100_000, "manifest.json")
