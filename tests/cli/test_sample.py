"""`bessemer sample` at several truncations and with mixed styles, and `bessemer project`, on an untrained StyleGAN2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.cli.sample import numbers
from bessemer.errors import BessemerError, DataError, SpecError
from bessemer.orchestration.run_directory import RunDirectory
from bessemer.spec.job import JobSpec
from bessemer.systems.adversarial.stylegan2 import StyleGAN2
from bessemer.systems.registry import build
from bessemer.systems.snapshot import SnapshotInfo, sampled_state, save_snapshot

SMALL = {"resolution": 16, "latent_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 16}


def made(root: Path, name: str, preset: str, **fields: object) -> Path:
    """A run with one snapshot."""
    job = JobSpec.model_validate(
        {
            "name": name,
            "system": {"name": name, "preset": preset},
            "data": {"path": "nowhere"},
            "training": {"total_kimg": 1, "batch_size": 8, "slice_size": 8},
        }
    )
    directory = RunDirectory.create(root, job).path
    system = build(name, preset, fields)
    system.init_weights(torch.Generator().manual_seed(1))
    config, classes = system.config.model_dump(mode="json"), [f"c{i}" for i in range(system.config.classes)]
    info = SnapshotInfo(name, config, 8000, {"half_life_kimg": 10.0}, 7, "abc", classes, [5] * len(classes))
    save_snapshot(directory / "snapshots" / "kimg-000008.000", sampled_state(system), info)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs"), "stylegan2", "tiny32", **SMALL)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def cells(path: Path, size: int = 16) -> NDArray[np.uint8]:
    """[rows, columns, H, W, C] of a grid."""
    pixels = np.asarray(Image.open(path))
    rows, columns = (n // size for n in pixels.shape[:2])
    return pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2)


def test_a_sheet_shows_the_same_latents_at_every_truncation(run: Path, tmp_path: Path) -> None:
    options = [word for t in (0.001, 0.5, 1) for word in ("--truncation", t)]
    text = invoke("sample", run, "--out", tmp_path / "sheet.png", "--rows", 4, *options, "--device", "cpu")
    assert "3 x 4 images" in text
    sheet = cells(tmp_path / "sheet.png").astype(int)
    assert sheet.shape[:2] == (3, 4)
    spread = [np.abs(row - row.mean(0)).mean() for row in sheet]
    assert spread[0] < spread[1] < spread[2], "truncation takes variety"
    # The same latent, so a column's images are more alike than a row's.
    assert np.abs(sheet[1] - sheet[2]).mean() < np.abs(sheet[2] - np.roll(sheet[2], 1, 0)).mean()


def test_mixed_styles(run: Path, tmp_path: Path) -> None:
    for layers in ("0-5", "5"):
        out = tmp_path / f"{layers}.png"
        assert "3 x 3 images" in invoke("sample", run, "--out", out, "--rows", 2, "--mix", layers, "--device", "cpu")
    all_layers, last = cells(tmp_path / "0-5.png").astype(int), cells(tmp_path / "5.png").astype(int)
    assert np.array_equal(all_layers[0], last[0])
    assert np.array_equal(all_layers[1:, 0], last[1:, 0])
    for row in (1, 2):
        # All styles of the column make its image; the last alone leaves the row's.
        assert np.abs(all_layers[row, 1:] - all_layers[0, 1:]).max() <= 1
        assert np.abs(last[row, 1] - last[row, 0]).mean() < np.abs(last[row, 1] - last[0, 1]).mean()


def test_projection_writes_the_image_beside_what_was_found(run: Path, tmp_path: Path) -> None:
    invoke("sample", run, "--out", tmp_path / "one.png", "--rows", 1, "--device", "cpu")
    out, latent = tmp_path / "found.png", tmp_path / "w.safetensors"
    text = invoke(
        "project", run, tmp_path / "one.png", "--out", out, "--latent", latent, "--steps", 40, "--device", "cpu"
    )
    start, end = (float(word) for word in text.split("distance ")[1].split(" in ")[0].split(" -> "))
    assert end < start
    (pair,) = cells(out)
    assert np.array_equal(pair[0], cells(tmp_path / "one.png")[0, 0])
    kept = load_file(latent)
    system = build("stylegan2", "tiny32", SMALL)
    assert isinstance(system, StyleGAN2)
    system.generator.load_state_dict(
        {
            k.removeprefix("generator."): v
            for k, v in load_file(run / "snapshots" / "kimg-000008.000" / "weights.safetensors").items()
        }
    )
    noise = [kept[f"noise_{i}"] for i in range(len(kept) - 1)]
    with torch.no_grad():
        image = system.generator.synthesis(system.generator.broadcast(kept["w"][None]), noise)[0].clamp(-1, 1)
    pixels = image.add(1).mul(127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(pixels - pair[1]).max() <= 1


def test_numbers() -> None:
    assert numbers("0-3,7", "--mix") == [0, 1, 2, 3, 7]
    for wrong in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(SpecError, match="--mix"):
            numbers(wrong, "--mix")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["sample", "{run}", "--mix", "6"], SpecError, r"\[6\] are not there; at 16 pixels they are 0 to 5"),
        (
            ["sample", "{run}", "--mix", "0", "--truncation", "1", "--truncation", "2"],
            SpecError,
            "give --truncation once",
        ),
        (["project", "{run}", "{run}/job.yaml"], DataError, "give an image file"),
        (["project", "{run}", "nowhere.png"], DataError, "nowhere.png"),
        (["sample", "{other}", "--mix", "0"], SpecError, "biggan has no styles to mix"),
        (["project", "{other}", "x.png"], SpecError, "biggan has no space W"),
    ],
)
def test_what_is_refused(
    run: Path, tmp_path: Path, arguments: list[str], error: type[BessemerError], message: str
) -> None:
    other = (
        made(tmp_path, "biggan", "tiny32", generator_width=2, generator_attention=()) if "{other}" in arguments else ""
    )
    with pytest.raises(error, match=message):
        invoke(*(a.format(run=run, other=other) for a in arguments), "--device", "cpu")
