import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from bessemer.cli.data import app, pack
from bessemer.data.manifest import Manifest
from bessemer.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(folder / "1.png")
            Image.new("L", (12, 8), 7).save(folder / "2.png")
    (tmp_path / "images" / "README.md").write_text("x")
    return tmp_path / "images"


def invoke(*arguments: object, verb: str = "pack", code: int = 0) -> str:
    result = CliRunner().invoke(app, [verb, *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_summary_for_people(images: Path, tmp_path: Path) -> None:
    output = invoke(images, tmp_path / "set", "--size", 8, "--mode", "RGB", "--resize", "box")
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert lines["samples"] == "4 images, 8x8 RGB"
    assert lines["classes"] == "2, of 2 samples each"
    assert lines["stored"] == "2 byte for byte, 2 as new files"
    assert lines["shards"].startswith("1, ")
    assert lines["split"] == "train (not taken: test)"
    assert lines["ignored"] == "1 .md"
    assert lines["where"] == str(tmp_path / "set")


def test_json(images: Path, tmp_path: Path) -> None:
    output = invoke(images, tmp_path / "set", "--size", 8, "--mode", "l", "--split", "all", "--limit", 1, "--json")
    summary = json.loads(output)
    manifest = Manifest.load(tmp_path / "set")
    assert summary["hash"] == manifest.hash
    assert summary["classes"] == {"cat": 1, "dog": 1}
    assert (summary["samples"], summary["shards"]) == (2, 1)
    assert [(one["name"], one["shape"]) for one in summary["fields"]] == [("images", [1, 8, 8])]
    assert summary["packing"]["limit"] == 1


def test_overwrite(images: Path, tmp_path: Path) -> None:
    options = ("--size", 8, "--mode", "RGB")
    invoke(images, tmp_path / "set", *options)
    with pytest.raises(DataError, match="--overwrite"):
        invoke(images, tmp_path / "set", *options)
    invoke(images, tmp_path / "set", *options, "--overwrite", "--shard-size", 1)


@pytest.mark.multiprocess
def test_workers_and_labels(images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,class\ntrain/cat/1,b\ntrain/dog/1,a\ntrain/cat/2,a\ntrain/dog/2,a\n")
    options = ("--size", 8, "--mode", "RGB", "--labels", tmp_path / "labels.csv", "--json")
    summary = json.loads(invoke(images, tmp_path / "set", *options, "--workers", 2))
    assert summary["classes"] == {"a": 3, "b": 1}
    assert summary["packing"]["labels"] == "labels.csv"


def test_mistakes_name_the_option_that_fixes_them(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--mode RGB"):
        invoke(images, tmp_path / "set", "--size", 8)
    with pytest.raises(DataError, match="--size 8"):
        invoke(images, tmp_path / "set", "--mode", "RGB")
    with pytest.raises(DataError, match="'nearest' is unknown"):
        invoke(images, tmp_path / "set", "--resize", "nearest")
    assert CliRunner().invoke(app, ["pack", str(images), str(tmp_path / "set"), "--size", "0"]).exit_code == 2
    assert not (tmp_path / "set").exists()


def test_the_command_is_a_plain_function_too(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(str(images), tmp_path / "set", size=8, mode="RGB")
    assert "4 images, 8x8 RGB" in capsys.readouterr().out


def test_index_verify_and_info(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    invoke(images, folder, "--size", 8, "--mode", "RGB")
    assert invoke(folder, "--deep", verb="verify").startswith("ok: 4 samples in 1 shards, hash ")
    assert json.loads(invoke(folder, "--json", verb="verify")) == []
    found = json.loads(invoke(folder, "--json", "--all", "--grid", tmp_path / "grid.png", verb="info"))
    assert (found["samples"], found["classes"], found["superfluous"]) == (4, {"cat": 2, "dog": 2}, 2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (32, 32)
    text = invoke(folder, verb="info")
    assert "samples  4 images\n" in text
    assert "images   8x8 RGB as png; mean" in text
    assert "cat          2  50.0%" in text
    (folder / "manifest.json").unlink()
    summary = json.loads(invoke(folder, "--workers", 1, "--json", verb="index"))
    assert summary["classes"] == {"0": 2, "1": 2}
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "shard-000000.tar: its content differs" in invoke(folder, verb="verify", code=1)
    assert json.loads(invoke(folder, "--json", verb="verify", code=1))[0]["file"] == "shard-000000.tar"
