"""Addresses of MLflow stores: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bessemer.errors import MachineError, TrackingError
from bessemer.tracking.mlflow_store import check_uri, how_to_open, redact, resolve_uri, server_command, store_to_serve


def test_relative_sqlite_paths_start_at_the_runs(tmp_path: Path) -> None:
    assert resolve_uri("sqlite:///mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:////data/mlflow.db", tmp_path) == "sqlite:////data/mlflow.db"
    assert resolve_uri("http://host:5000", tmp_path) == "http://host:5000"


def test_postgresql_names_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an address without one means depends on the version of SQLAlchemy."""
    assert resolve_uri("postgresql://host/a", tmp_path) == "postgresql+psycopg://host/a"
    assert resolve_uri("postgresql+pg8000://host/a", tmp_path) == "postgresql+pg8000://host/a"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "psycopg" else find(name))
    with pytest.raises(TrackingError, match=r"psycopg is not installed; `pip install 'bessemer\[postgresql\]'`"):
        check_uri("postgresql://host/a", tmp_path)


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    assert redact("postgresql://user:secret@host/db") == "postgresql://user:***@host/db"
    assert redact("http://host:5000/a@b") == "http://host:5000/a@b"
    assert "secret" not in how_to_open("postgresql://user:secret@host/db", tmp_path)
    assert "secret" not in how_to_open("http://user:secret@host", tmp_path)


def test_person_is_led_to_the_pages_of_runs() -> None:
    assert how_to_open("http://host:5000/", "runs") == "http://host:5000/?workflowType=machine_learning"
    assert how_to_open("sqlite:///mlflow.db", "a b") == "bessemer mlflow --runs 'a b'"
    assert how_to_open("sqlite:////other.db", "runs") == "bessemer mlflow --runs runs --uri sqlite:////other.db"


def test_stores_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no run has been tracked there yet"):
        store_to_serve("sqlite:///mlflow.db", tmp_path)
    with pytest.raises(TrackingError, match="is an MLflow server already; open http://host"):
        store_to_serve("http://host", tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(100))
    assert store_to_serve("sqlite:///mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=rf"--port {port}: cannot be used on 127.0.0.1 \(Address already in use"):
            server_command("sqlite:////mlflow.db", port)
    command, _ = server_command("sqlite:////mlflow.db", port)
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--host") + 1] == "127.0.0.1"


def _refused(uri: str, root: Path, rule: str) -> None:
    with pytest.raises(TrackingError, match=rule) as caught:
        check_uri(uri, root)
    message = str(caught.value)
    assert message.startswith(f"tracking.uri {redact(uri)!r}: ")
    assert "or set tracking.mlflow to false" in message
    assert len(message.splitlines()) == 1


def test_sqlite(tmp_path: Path) -> None:
    check_uri("sqlite:///mlflow.db", tmp_path / "runs")  # made with the first run
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left behind
    (tmp_path / "good.db").write_bytes(b"SQLite format 3\0" + bytes(100))
    check_uri("sqlite:///good.db", tmp_path)
    (tmp_path / "text.db").write_text("not a database")
    _refused("sqlite:///text.db", tmp_path, "is not an SQLite database")
    (tmp_path / "dir.db").mkdir()
    _refused("sqlite:///dir.db", tmp_path, "is a directory")
    _refused("sqlite:///text.db/mlflow.db", tmp_path, "cannot write")
    _refused("sqlite:///", tmp_path, "is a directory|names no database file")
    _refused("sqlite:///a.db?mode=ro", tmp_path, "names no database file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_sqlite_in_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    _refused("sqlite:///mlflow.db", tmp_path, "no permission")


@pytest.mark.parametrize(
    "uri", ["", "mlruns", "./mlruns", "file:///tmp/mlruns", "ftp://host", "sqlite:mlflow.db", "sqlite://host/a.db"]
)
def test_addresses_that_are_none(tmp_path: Path, uri: str) -> None:
    _refused(uri, tmp_path, "not an address that Bessemer knows")


@pytest.mark.parametrize(
    "uri", ["http://", "http:///x", "https://:5000", "http://[::1", "http://host:port", "mysql://"]
)
def test_malformed_addresses(tmp_path: Path, uri: str) -> None:
    _refused(uri, tmp_path, "names no host|malformed")


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    _refused(f"http://127.0.0.1:{port}", tmp_path, "no MLflow server answers .*refused")
    _refused(f"postgresql://me:secret@127.0.0.1:{port}/db", tmp_path, f"nothing answers at 127.0.0.1:{port}")
    _refused("mysql+pymysql://no-such-host.invalid/db", tmp_path, re.escape("no-such-host.invalid:3306"))


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, int]]]:
    """A server whose answers by path can be set; 404 for others."""
    answers: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", answers
        http.shutdown()
        thread.join()


def test_server_is_asked_for_its_health(tmp_path: Path, server: tuple[str, dict[str, int]]) -> None:
    uri, answers = server
    _refused(uri, tmp_path, "its /health answers 404")
    answers["/health"] = 500
    _refused(uri, tmp_path, "its /health answers 500")
    for code in (200, 401, 403):
        answers["/health"] = code
        check_uri(uri + "/", tmp_path)
    answers["/prefix/health"] = 200
    check_uri(uri + "/prefix", tmp_path)


def test_missing_mlflow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackingError, match=r"pip install 'bessemer\[tracking\]'"):
        check_uri("sqlite:///mlflow.db", tmp_path)
