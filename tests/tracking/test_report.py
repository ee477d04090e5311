"""The report's data: complete, and safe against the run directory that it shows. The page itself: test_page.py."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bessemer.cli.report import report as report_command
from bessemer.data.fields import wave_file
from bessemer.errors import RunError
from bessemer.tracking.report import write_report


class Page(HTMLParser):
    """What a browser finds in the file before it runs anything."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.data: dict[str, Any] = json.loads(self.texts["script#data"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag + (f"#{dict(attrs)['id']}" if "id" in dict(attrs) else "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data

    @property
    def run(self) -> dict[str, Any]:
        (run,) = self.data["runs"]
        return dict(run)

    def pictures(self) -> list[bytes]:
        pictures = [p for run in self.data["runs"] for p in (*run["pictures"]["grids"], run["pictures"]["real"]) if p]
        assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)
        return [base64.b64decode(picture["src"].partition(",")[2]) for picture in pictures]


def _report(run: Any) -> Page:
    return Page(write_report(run.path))


def test_report_of_a_whole_run(make_run: Any) -> None:
    run = make_run(data_hash="d474").whole()
    page = _report(run)
    shown = page.run
    assert (shown["name"], shown["state"], shown["system"]) == ("quickstart", "finished", "biggan")
    (kid,) = shown["metrics"]
    assert (kid["metric"], kid["x"], kid["best"], kid["higher"]) == ("kid_efflite0", [0, 10, 20, 30, 40], 4, False)
    assert kid["error"] == [0.01] * 5
    assert ["generated images", "500", "500"] in kid["protocol"]
    assert shown["series"]["loss/generator"]["x"] == list(range(1, 41))  # what was superseded is gone
    marks = {(event["event"], event["kimg"]): event["mark"] for event in shown["events"] if event["mark"]}
    assert marks == {("worker lost", 15.0): "restart", ("resumed", 10.0): "restart"}
    assert page.pictures() == [*(run.png(kimg) for kimg in (0, 10, 20, 30, 40)), run.png(255)]
    assert shown["worlds"] == [[0.0, 2]]
    assert ["data_hash", "d474"] in shown["facts"]
    assert "batch_size: 64" in shown["job"]


def test_several_runs_and_what_differs(make_run: Any, tmp_path: Path) -> None:
    one, two = make_run("one").whole(), make_run("two").whole()
    job = two.path / "job.yaml"
    job.write_text(job.read_text().replace("batch_size: 64", "batch_size: 32"))
    page = Page(write_report([one.path, two.path], tmp_path / "both.html"))
    assert [run["name"] for run in page.data["runs"]] == ["one", "two"]
    assert page.data["differing"] == [["training.batch_size", ["64", "32"]]]


def test_page_is_offline_and_runs_its_own_script_only(make_run: Any) -> None:
    page = _report(make_run().whole())
    assert not [
        value for _, attributes in page.elements for name, value in attributes.items() if name in {"src", "href"}
    ]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not [name for _, attributes in page.elements if "style" in attributes for name in attributes]
    code = page.texts["script"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|@import|url\(", page.source
    )
    (policy,) = [attributes["content"] or "" for tag, attributes in page.elements if "http-equiv" in attributes]
    for name, text in (("script", code), ("style", page.texts["style"])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'; img-src data:; media-src data:; connect-src 'none';" in policy
    assert "unsafe" not in policy


def test_report_before_anything_happened(make_run: Any) -> None:
    run = make_run()
    assert _report(run).run["state"] == "stopped"
    run.journal.path.touch()
    (run.path / "job.yaml").unlink()
    (run.path / "run.json").unlink()
    shown = _report(run).run
    assert (shown["system"], shown["metrics"], shown["series"], shown["events"]) == (None, [], {}, [])
    assert shown["pictures"] == {"grids": [], "real": None, "sheets": [], "notes": []}


def test_failure_and_open_warnings(make_run: Any) -> None:
    run = make_run()
    run.event("warning", 0, about="mlflow", message="the store is away")
    run.event("failed", 1000, error="loss: not finite <at 1 kimg>")
    shown = _report(run).run
    assert shown["failure"] == "loss: not finite <at 1 kimg>"
    assert shown["warnings"] == ["mlflow: the store is away"]
    run.event("recovered", 1000, about="mlflow")
    assert _report(run).run["warnings"] == []


def test_protocols_are_kept_apart(make_run: Any) -> None:
    run = make_run().whole()
    run.evaluate(40_000, 0.2, samples=50, seed=7)
    first, second = _report(run).run["metrics"]
    assert (len(first["x"]), len(second["x"])) == (5, 1)
    assert {
        label for (label, _, a), (_, _, b) in zip(first["protocol"], second["protocol"], strict=True) if a != b
    } == {
        "generated images",
        "seed of latents",
    }


def test_values_that_are_not_finite_are_counted(make_run: Any) -> None:
    run = make_run()
    run.metrics(1000, 2000)
    run.journal.write("metrics", 3000, values={"loss/generator": float("nan"), "loss/new": float("inf")})
    series = _report(run).run["series"]
    assert (series["loss/generator"]["x"], series["loss/generator"]["bad"]) == ([1, 2], 1)
    assert series["loss/new"] == {"x": [], "h": [], "y": [], "bad": 1}


EVIL = "\"'></title></script></style></pre><!--<script>alert(1)</script><img src=x onerror=alert(2)>\u2028"


def hostile(run: Any, runs_root: Path) -> Path:
    """A run directory whose every text tries to run a script."""
    run.whole()
    run.event(EVIL, 40_000, **{EVIL: EVIL}, data_hash=EVIL)
    run.event("failed", 40_000, error=EVIL)
    run.event("warning", 40_000, about=EVIL, message=EVIL)
    run.journal.write("metrics", 39_000, values={EVIL: 1.0, f"loss/{EVIL}": 2.0, "__proto__": 1.0})
    run.evaluate(39_000, 0.3, weights=EVIL, reference_hash=EVIL)
    run.journal.write("evaluation", 39_000, metric=EVIL, value=1.0, extractor=EVIL, weights_sha256=[EVIL])
    run.journal.write("samples", 39_000, path=EVIL)
    run.journal.write("sheet", 39_000, path="samples/real.png", title=EVIL, note=EVIL)
    job = run.path / "job.yaml"
    job.write_text(f"{job.read_text().replace('name: biggan', 'name: ' + json.dumps(EVIL))}# {EVIL}\n")
    place = runs_root / "<img src=x onerror=alert(3)>"
    shutil.move(run.path, place)
    return place


def test_hostile_run_directory_stays_in_the_data(make_run: Any, runs_root: Path) -> None:
    place = hostile(make_run(evil_key=EVIL, git_sha=EVIL), runs_root)
    page = Page(write_report(place))
    assert [tag for tag, _ in page.elements if tag == "script"] == ["script", "script"]
    assert "alert" not in page.texts["script"]
    assert [tag for tag, _ in page.elements if tag in ("img", "svg", "iframe", "object", "embed")] == []
    assert html.unescape(page.texts["title"]) == "<img src=x onerror=alert(3)> - Bessemer"
    assert json.dumps(page.run).count("alert(2)") > 10  # it is all there, as data


def test_pictures_come_from_inside_and_must_be_png(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    secret = tmp_path / "secret.png"
    secret.write_bytes(run.png(77))
    (run.path / "samples" / "link.png").symlink_to(secret)
    (run.path / "samples" / "text.png").write_text("<svg onload=alert(1)>")
    huge = bytearray(run.png(78))
    huge[16:20] = (1 << 30).to_bytes(4, "big")
    (run.path / "samples" / "huge.png").write_bytes(huge)
    (run.path / "samples" / "real.png").symlink_to(secret)
    wrong = ["../../secret.png", str(secret), "samples/link.png", "samples/text.png", "samples/huge.png", "samples", 5]
    for nimg, path in enumerate(wrong):
        run.journal.write("samples", nimg, path=path)
        run.journal.write("sheet", nimg, path=path, title="t")
    run.grid(9000)
    page = _report(run)
    assert page.pictures() == [run.png(9)]
    assert page.run["pictures"]["sheets"] == []
    assert f"{len(wrong)} of {len(wrong) + 1} grids cannot be shown" in page.run["pictures"]["notes"][0]


def test_clips_and_sound_lie_beside_their_pictures(make_run: Any, tmp_path: Path) -> None:
    run = make_run().whole()
    samples = run.path / "samples"
    gif, wav = b"GIF89a" + bytes([9, 0, 8, 0]) + bytes(20), wave_file(np.zeros(100, np.int16), 8000)
    (samples / "kimg-000040.000.gif").write_bytes(gif)
    (samples / "real.wav").write_bytes(wav)
    (samples / "kimg-000030.000.gif").write_bytes(b"<svg onload=alert(1)>")
    (samples / "kimg-000020.000.wav").write_bytes(b"RIFF\0\0\0\0AVI LIST" + bytes(100))
    (tmp_path / "secret.gif").write_bytes(gif)
    (samples / "kimg-000010.000.gif").symlink_to(tmp_path / "secret.gif")
    pictures = _report(run).run["pictures"]
    assert [grid.get("plays") and grid["plays"]["type"] for grid in pictures["grids"]] == [
        None, None, None, None, "image/gif"
    ]  # fmt: skip
    newest, real = pictures["grids"][-1]["plays"], pictures["real"]["plays"]
    assert (newest["width"], newest["height"]) == (9, 8)
    assert newest["src"] == "data:image/gif;base64," + base64.b64encode(gif).decode()
    assert real["src"] == "data:audio/wav;base64," + base64.b64encode(wav).decode()
    assert pictures["notes"] == [
        "2 sheets cannot be played here: their clips or sounds are damaged, or too large for this page."
    ]


def test_many_grids_are_thinned_evenly_with_both_ends(make_run: Any) -> None:
    run = make_run()
    for kimg in range(200):
        run.grid(kimg * 1000)
    kimgs = [grid["kimg"] for grid in _report(run).run["pictures"]["grids"]]
    assert len(kimgs) == 60
    assert (kimgs[0], kimgs[-1]) == (0, 199)
    assert {b - a for a, b in itertools.pairwise(kimgs)} == {3, 4}


def test_pictures_of_several_runs_share_one_limit(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bessemer.tracking.report_data.MOST_BYTES", 2 * 10 * 72)
    runs = [make_run(name) for name in ("one", "two")]
    for run, kimg in itertools.product(runs, range(40)):
        run.grid(kimg * 1000)
    page = Page(write_report([run.path for run in runs], tmp_path / "both.html"))
    for run in page.data["runs"]:
        kimgs = [grid["kimg"] for grid in run["pictures"]["grids"]]
        assert (len(kimgs), kimgs[0], kimgs[-1]) == (10, 0, 39)
        assert "10 of 40 grids are shown" in run["pictures"]["notes"][0]


def test_sheets_of_a_run_are_shown_once_each(make_run: Any) -> None:
    run = make_run().whole()
    for nimg in (10_000, 20_000):
        run.journal.write("sheet", nimg, path="samples/real.png", title="Truncation", note="from left to right")
    (sheet,) = _report(run).run["pictures"]["sheets"]
    assert (sheet["label"], sheet["note"], sheet["kimg"]) == ("Truncation", "from left to right", 20.0)


def test_command_and_errors(make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run().whole()
    out = tmp_path / "page.html"
    report_command(run=[str(run.path)], out=out)
    assert "report:" in capsys.readouterr().out
    assert Page(out).run["name"] == "quickstart"
    report_command(run=[str(run.path)], json=True)
    printed = json.loads(capsys.readouterr().out)
    assert Path(printed["report"]) == run.path / "report.html"
    assert printed["runs"][0]["best"] == pytest.approx(0.1)
    with pytest.raises(RunError, match=r"absent/page\.html: cannot be written .*--out"):
        report_command(run=[str(run.path)], out=tmp_path / "absent" / "page.html")
    with pytest.raises(RunError, match="no run directory"):
        report_command(run=[str(tmp_path)], out=None)
