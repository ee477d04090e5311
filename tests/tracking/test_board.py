"""The board: a real server, asked by a plain client and shown in a real Chromium."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from tests.tracking.browser import CHROMIUM, browser
from tests.tracking.test_report import EVIL, hostile

from bessemer.data.fields import wave_file
from bessemer.errors import MachineError, RunError
from bessemer.tracking.board import is_loopback, serve

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(root: Path, *options: str) -> Iterator[str]:
    """Address of `bessemer board` for this store."""
    command = [sys.executable, "-m", "bessemer.cli", "board", "--root", str(root), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.terminate()


def ask(address: str, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; redirections are not followed."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_board_of_a_store(make_run: Any, runs_root: Path) -> None:
    run = make_run("one").whole()
    make_run("broken").path.joinpath("run.json").unlink()
    with serving(runs_root) as address:
        wait_for_server(address)
        status, headers, body = ask(address, "/rows")
        assert (status, headers["cache-control"], headers["x-frame-options"]) == (200, "no-store", "DENY")
        content = json.loads(body)
        assert [(row["name"], row["curves"][0]["best"]) for row in content["rows"]] == [("one", pytest.approx(0.1))]
        assert content["broken"] == [["broken", "run.json is missing"]]

        # Nothing new, nothing sent; then a new value, at once.
        assert ask(address, "/rows", If_None_Match=headers["etag"])[0] == 304
        run.evaluate(50_000, 0.05)
        status, _, body = ask(address, "/rows", If_None_Match=headers["etag"])
        assert (status, json.loads(body)["rows"][0]["curves"][0]["best"]) == (200, 0.05)

        report = json.loads(ask(address, "/report?run=one")[2])["runs"][0]
        assert report["metrics"][0]["x"][-1] == 50
        picture = report["pictures"]["grids"][0]["src"]
        assert picture.startswith("/pictures/one/samples/kimg-000000.000.png?v=")
        status, headers, body = ask(address, picture)
        assert (status, headers["content-type"], body) == (200, "image/png", run.png(0))
        sound = wave_file(np.zeros(100, np.int16), 8000)
        (run.path / "samples" / "real.wav").write_bytes(sound)
        status, headers, body = ask(address, "/pictures/one/samples/real.wav")
        assert (status, headers["content-type"], body) == (200, "audio/wav", sound)

        (runs_root.parent / "secret.png").write_bytes(run.png(1))
        outside = ("../../secret.png", "job.yaml", "..%2f..%2fsecret.png", "../../one/samples/real.png/x")
        for path in ("/report?run=absent", "/report", "/report?run=..", "/pictures/%2e%2e/secret.png"):
            assert ask(address, path)[0] == 404, path
        for path in outside:
            assert ask(address, f"/pictures/one/{path}")[0] == 404, path
        for method in ("POST", "PUT", "DELETE"):
            assert ask(address, "/rows", method)[0] == 405
        assert ask(address, "/rows", Host="evil.example")[0] == 421  # a name that was made to point here
        assert ask(address, "/rows", Host="localhost")[0] == 200


def wait_for_server(address: str) -> None:
    import time

    for _ in range(200):
        with contextlib.suppress(OSError):
            ask(address, "/favicon.ico")
            return
        time.sleep(0.05)
    raise AssertionError("the board does not answer")


def test_a_token_is_asked_for(make_run: Any, runs_root: Path) -> None:
    make_run("one").whole()
    with serving(runs_root, "--host", "0.0.0.0") as address:
        there = f"http://127.0.0.1:{urlsplit(address).port}"
        wait_for_server(there)
        token = urlsplit(address).query
        assert token.startswith("token=")
        assert len(token) > 30
        for path in ("/", "/rows", "/report?run=one", "/pictures/one/samples/real.png", "/rows?token=wrong"):
            assert ask(there, path)[0] == 401
        status, headers, _ = ask(there, f"/?{token}")
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert ask(there, "/rows", Cookie=cookie.partition(";")[0])[0] == 200


def test_where_it_listens(runs_root: Path) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "evil.localhost.com", "")] == [False] * 4
    with pytest.raises(MachineError, match=r"--host 192.0.2.1 --port 6006: cannot be used .*--port 6007"):
        serve(runs_root, "192.0.2.1", 6006, None, print)
    with pytest.raises(RunError, match=r"absent: is no directory.*--root"):
        serve(runs_root / "absent", "127.0.0.1", 0, None, print)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_lives(make_run: Any, runs_root: Path, tmp_path: Path) -> None:
    one = make_run("one").whole()
    two = make_run("two")
    two.event("started", 0, workers=2)
    two.evaluate(0, 0.6)
    two.grid(0)
    hostile(make_run("evil", note=EVIL), runs_root)
    with serving(runs_root) as address, browser(tmp_path / "profile") as tab:
        wait_for_server(address)
        tab.open(address)
        rows = "[...document.querySelectorAll('table.runs tbody tr')].map((row) => row.querySelector('a').textContent)"
        tab.wait_for(f"{rows}.length === 3")
        assert set(tab.evaluate(rows)) == {"one", "two", "<img src=x onerror=alert(3)>"}
        tab.evaluate("[...document.querySelectorAll('thead button')].find((one) => one.textContent === 'best').click()")
        # one and the hostile run's own protocol share 0.1; two is worse
        assert tab.evaluate(rows)[-1] == "two"
        tab.evaluate("searchBox.value = 'two'; searchBox.dispatchEvent(new Event('input'))")
        assert tab.evaluate(rows) == ["two"]

        two.train(0, 10_000)  # it goes on, and the page follows by itself
        tab.wait_for("document.querySelector('td.strong').textContent.startsWith('0.4')")
        tab.evaluate("searchBox.value = ''; searchBox.dispatchEvent(new Event('input'))")
        tab.evaluate("document.querySelectorAll('td.pick input').forEach((one) => one.click())")
        tab.click("button.primary")
        tab.wait_for("document.querySelectorAll('#grid-slider').length === 1")
        shown = "[...document.querySelectorAll('button.picture img')].map((image) => image.alt)"
        assert "two, 10 kimg" in tab.evaluate(shown)
        two.train(10_000, 20_000)
        one.event("warning", 40_000, about="disk", message="almost full")
        tab.wait_for(f"{shown}.includes('two, 20 kimg')")
        assert "one: disk: almost full" in tab.evaluate("document.body.innerText")
        assert tab.evaluate("document.querySelectorAll('img[src=x]').length") == 0
        assert tab.problems == []
