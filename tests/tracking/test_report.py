"""The report: complete, offline, and safe against the run directory that it shows."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bessemer.cli.report import report as report_command
from bessemer.errors import RunError
from bessemer.tracking.report import write_report

_VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes and texts; balanced tags are asserted on the way."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag: str = "body") -> str:
        """All text inside elements of this name, without scripts and styles."""
        hidden = self.texts.get("script", []) + self.texts.get("style", [])
        return " ".join(piece for piece in self.texts.get(tag, []) if piece not in hidden)

    def all(self, tag: str, class_name: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and (class_name is None or class_name in (attributes.get("class") or "").split())
        ]

    def series(self, label: str) -> list[list[Any]]:
        """Points of all lines with this label."""
        return [json.loads(g["data-points"] or "") for g in self.all("g", "series") if g["data-label"] == label]

    def pictures(self) -> list[bytes]:
        sources = [image.get("src") or "" for image in self.all("img")]
        assert all(not source or source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2]) for source in sources if source]


def _report(run: Any) -> Page:
    return Page(write_report(run.path))


def test_report_of_a_whole_run(make_run: Any) -> None:
    run = make_run(data_hash="d474").whole()
    page = _report(run)
    assert page.text("h1") == "quickstart"
    (kid,) = page.series("")
    assert [point[0] for point in kid] == [0, 10, 20, 30, 40]
    assert kid[0] == [0, "0.5", "\u00b1 0.01"]
    (loss,) = page.series("generator")
    assert [point[0] for point in loss] == list(range(1, 41))  # what was superseded is gone, nothing is doubled
    assert len(page.series("images per second")) == 1
    markers = re.findall(r"<title>([a-z ]+) at ([\d.]+) kimg</title>", page.source)
    assert {("worker lost", "15"), ("resumed", "10")} == set(markers)
    grids = [run.png(kimg) for kimg in (0, 10, 20, 30, 40)]
    assert page.pictures() == [*grids, run.png(255), grids[0], grids[-1]]  # slider, real, first, last
    (slider,) = [element for element in page.all("input") if element.get("type") == "range"]
    assert (slider["max"], slider["value"]) == ("4", "4")
    assert [("hidden" in frame) for frame in page.all("div", "frame")] == [True] * 4 + [False]
    text = page.text()
    for said in ("finished", "biggan cifar10-ch16", "40 k", "of 40 kimg", "lower is better", "1 restart", "0123abc"):
        assert said in text
    for said in ("d474", "generated images", "500", "batch_size: 64", "worker lost", "one standard error"):
        assert said in text


def test_page_is_offline_and_runs_its_own_script_only(make_run: Any) -> None:
    page = _report(make_run().whole())
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in {"src", "href"}
    ]
    assert all((address or "data:").startswith("data:") for address in addresses)
    assert not re.search(r"https?://|@import|url\(", page.source)
    (script,) = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] or "" for meta in page.all("meta") if "http-equiv" in meta]
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_report_before_anything_happened(make_run: Any) -> None:
    run = make_run()
    page = _report(run)
    for said in ("stopped", "No sample grid yet", "No evaluation yet", "No training metrics yet", "No events yet"):
        assert said in page.text()
    run.journal.path.touch()
    (run.path / "job.yaml").unlink()
    (run.path / "run.json").unlink()
    assert "unknown system" in _report(run).text()
    assert "job.yaml is missing" in _report(run).text()


def test_failure_and_open_warnings_stand_at_the_top(make_run: Any) -> None:
    run = make_run()
    run.event("warning", 0, about="mlflow", message="the store is away")
    run.event("failed", 1000, error="loss: not finite <at 1 kimg>")
    page = _report(run)
    assert "loss: not finite <at 1 kimg>" in page.text("header")
    assert "mlflow: the store is away" in page.text("header")
    run.event("recovered", 1000, about="mlflow")
    assert "the store is away" not in _report(run).text("header")


def test_protocols_are_kept_apart_and_named(make_run: Any) -> None:
    run = make_run().whole()
    run.evaluate(40_000, 0.2, samples=50, seed=7)
    page = _report(run)
    assert [len(points) for points in page.series("")] == [5, 1]
    assert "measured by 2 protocols, which differ in: generated images, seed of latents" in page.text()
    assert "kid_efflite0, protocol 2" in page.text("h3")
    assert "0.2" not in page.text("header").replace("0.25", "")  # the headline stays with the run's own protocol


def test_values_that_are_not_finite_are_counted(make_run: Any) -> None:
    run = make_run()
    run.metrics(1000, 2000)
    run.journal.write("metrics", 3000, values={"loss/generator": float("nan")})
    page = _report(run)
    assert "1 values were not finite" in page.text()
    assert [point[0] for point in page.series("generator")[0]] == [1, 2]


def test_the_breakdown_of_a_step_and_the_utilisation_have_charts_of_their_own(make_run: Any) -> None:
    run = make_run()
    for nimg in (1000, 2000):
        run.journal.write("metrics", nimg, values={"time/forward": 2.5, "time/ema": 0.01, "throughput/mfu": 0.4})
    run.metrics(3000)
    page = _report(run)
    titles = [title for title in page.texts["h3"] if "Seconds per" in title or "tilisation" in title]
    assert titles == ["Model FLOP utilisation", "Seconds per 1000 images, by part of the step"]
    assert page.series("forward") == [[[1, "2.5", ""], [2, "2.5", ""]]]
    assert page.series("mfu") == [[[1, "0.4", ""], [2, "0.4", ""]]]
    assert page.series("images per second") == [[[3, "100", ""]]]


def test_many_lines_are_split_and_thinned(make_run: Any) -> None:
    run = make_run()
    lines = [
        json.dumps({"kind": "metrics", "nimg": n, "time": 1.7e9, "values": {f"loss/part{i}": n * i for i in range(8)}})
        for n in range(2000)
    ]
    run.journal.path.write_text("\n".join(lines) + "\n")
    page = _report(run)
    assert page.text("h3").count("Losses") == 2
    assert len(page.series("part3")[0]) == 240
    assert "mean of neighbouring lines" in page.text()


def test_hostile_run_directory_injects_nothing(make_run: Any, runs_root: Path, tmp_path: Path) -> None:
    evil = "\"'></title></script></style></pre><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = make_run(evil_key=evil, **{evil.replace("/", "|"): 1, "git_sha": evil}).whole()
    run.event(evil, 40_000, **{evil: evil}, data_hash=evil)
    run.event("failed", 40_000, error=evil)
    run.event("warning", 40_000, about=evil, message=evil)
    run.journal.write("metrics", 39_000, values={evil: 1.0, f"loss/{evil}": 2.0})
    run.evaluate(39_000, 0.3, weights=evil, reference_hash=evil)
    run.journal.write("evaluation", 39_000, metric=evil, value=1.0, extractor=evil)
    run.journal.write("samples", 39_000, path=evil)
    job = run.path / "job.yaml"
    job.write_text(f"{job.read_text().replace('name: biggan', 'name: ' + json.dumps(evil))}# {evil}\n")
    place = runs_root / "<img src=x onerror=alert(3)>"
    shutil.move(run.path, place)
    page = Page(write_report(place))
    assert len(page.all("script")) == 1
    assert len(page.texts["script"]) == 1
    assert "alert" not in page.texts["script"][0]
    assert "alert" not in "".join(page.texts["style"])
    assert all(set(image) <= {"src", "alt", "width", "height"} for image in page.all("img"))
    assert all(
        (image.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,") for image in page.all("img")
    )
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text().count("alert(2)") > 8  # shown, as text


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
    run.grid(9000)
    page = _report(run)
    assert page.pictures() == [run.png(9)]
    assert f"{len(wrong)} of {len(wrong) + 1} grids cannot be shown" in page.text()


def test_many_grids_are_thinned_evenly_with_both_ends(make_run: Any) -> None:
    run = make_run()
    for kimg in range(200):
        run.grid(kimg * 1000)
    page = _report(run)
    labels = [float((frame["data-label"] or "").split()[0]) for frame in page.all("div", "frame")]
    assert len(labels) == 60
    assert (labels[0], labels[-1]) == (0, 199)
    assert {b - a for a, b in itertools.pairwise(labels)} == {3, 4}
    assert "60 of 200 grids are shown" in page.text()


def test_report_goes_where_it_is_told(make_run: Any, tmp_path: Path) -> None:
    run = make_run().whole()
    out = tmp_path / "page.html"
    assert write_report(run.path, out) == out
    assert not (run.path / "report.html").exists()
    with pytest.raises(RunError, match=r"report .*none/page.html: cannot be written .*--out"):
        write_report(run.path, tmp_path / "none" / "page.html")
    with pytest.raises(RunError, match="no run directory"):
        write_report(tmp_path)


def test_command_says_where_the_page_is(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run().whole()
    report_command(str(run.path))
    assert capsys.readouterr().out == f"report: {run.path / 'report.html'}\n"
    report_command(str(run.path), json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["report"] == str(run.path / "report.html")
    assert (shown["mlflow_run"], shown["run"]["state"]) == (None, "finished")
