"""Figures for papers: which are drawn, what their SVG says, and names that are no file names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bessemer.cli.report import report as report_command
from bessemer.errors import MachineError
from bessemer.tracking.figures import draw_figures


def test_every_curve_is_drawn_with_a_line_for_each_run(
    make_run: Any, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("one").whole()
    two = make_run("two_$x_1$")
    two.train(0, 20_000)
    two.evaluate(20_000, 0.01, samples=50)
    place = runs_root / "figures"
    report_command([str(runs_root / "one"), str(two.path)], figures=place)
    names = {"kid_efflite0", "loss-generator", "loss-discriminator", "throughput-img_per_s"}
    assert {path.name for path in place.iterdir()} == {f"{name}.{end}" for name in names for end in ("png", "svg")}
    assert f"figures: 4 in {place}" in capsys.readouterr().out
    page = (place / "kid_efflite0.svg").read_text()
    said = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert {"kid_efflite0", "kimg", "one, protocol 1", "two_$x_1$, protocol 1", "two_$x_1$, protocol 2"} <= set(said)
    with Image.open(place / "loss-generator.png") as picture:
        assert picture.size == (960, 640)
    before = page
    draw_figures([runs_root / "one", two.path], place)
    assert (place / "kid_efflite0.svg").read_text() == before


def test_names_from_elsewhere_are_text_and_stay_inside(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    evil = "../../<script>alert(1)</script>"
    run.journal.write("metrics", 1000, values={evil: 1.0, "..": 2.0, ".": 1.0})
    run.journal.write("metrics", 2000, values={evil: 2.0, "..": 3.0})
    place = tmp_path / "deep" / "figures"
    paths = draw_figures([run.path], place)
    assert {path.parent for path in paths} == {place}
    assert {path.name for path in paths} == {
        f"{name}.{end}" for name in ("script-alert-1-script", "curve", "curve_") for end in ("png", "svg")
    }  # fmt: skip
    assert "<script" not in (place / "script-alert-1-script.svg").read_text()


def test_a_place_that_cannot_be_written_is_named(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"--figures .*file/.*cannot be written"):
        draw_figures([make_run().whole().path], tmp_path / "file")
