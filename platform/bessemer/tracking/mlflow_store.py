"""MLflow stores: which addresses are accepted, whether one answers, how a person opens it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from bessemer.errors import MachineError, TrackingError
from bessemer.spec.job import TrackingSpec

__all__ = [
    "check_uri",
    "how_to_open",
    "page_of",
    "quiet_mlflow",
    "redact",
    "resolve_uri",
    "server_command",
    "store_to_serve",
]

_SQLITE = "sqlite:///"
_HTTP = ("http", "https")
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_POSTGRESQL = "postgresql://"
_DRIVER = "psycopg"  # of addresses that name none; which one they mean depends on the version of SQLAlchemy
_TIMEOUT = 5.0  # seconds
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # With the defaults a dead server blocks each call for minutes; here the journal keeps what a call loses.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Failures are reported by the mirror; MLflow's own lines, and its links, would tear the progress display.
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def resolve_uri(uri: str, runs_root: str | Path) -> str:
    """``uri`` with a relative sqlite path taken from ``runs_root``, or with the driver of a PostgreSQL database."""
    if uri.startswith(_POSTGRESQL):
        return f"postgresql+{_DRIVER}://{uri.removeprefix(_POSTGRESQL)}"
    if uri.startswith(_SQLITE) and not uri.startswith(_SQLITE + "/"):
        return _SQLITE + str(Path(runs_root).absolute() / uri.removeprefix(_SQLITE))
    return uri


def redact(uri: str) -> str:
    """``uri`` without a password, for messages and files."""
    return re.sub(r"(://[^/@:]*):[^@/]*@", r"\1:***@", uri)


def quiet_mlflow() -> None:
    """Set how MLflow behaves in this process, before it is imported; what the person set wins."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def page_of(server: str) -> str:
    """Address of an MLflow server's page of runs; without the query it starts in a mode for chats."""
    return f"{redact(server).rstrip('/')}/?workflowType=machine_learning"


def how_to_open(uri: str, runs_root: str | Path) -> str:
    """What a person opens, or types, to see the runs of ``tracking.uri``."""
    if uri.startswith(("http://", "https://")):
        return page_of(uri)
    changed = "" if uri == TrackingSpec().uri else f" --uri {shlex.quote(redact(uri))}"
    return f"bessemer mlflow --runs {shlex.quote(str(runs_root))}{changed}"


def store_to_serve(uri: str, runs_root: str | Path) -> str:
    """``uri``, resolved, of a store that is there and that a server started here can show.

    Raises:
        TrackingError: it is a server itself, or there is no such store.
    """
    if uri.startswith(("http://", "https://")):
        raise TrackingError(f"--uri {redact(uri)}: is an MLflow server already; open {page_of(uri)}")
    check_uri(uri, runs_root)
    resolved = resolve_uri(uri, runs_root)
    if resolved.startswith(_SQLITE) and not (path := Path(resolved.removeprefix(_SQLITE))).is_file():
        raise TrackingError(f"{path}: no run has been tracked there yet; name another place with --runs or --uri.")
    return resolved


def server_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of an MLflow server for the store ``uri`` on a loopback port.

    Raises:
        MachineError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: waiting closes do not matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MachineError(
                f"--port {port}: cannot be used on 127.0.0.1 ({_reason(error)}); take another, such as "
                f"--port {port + 1 if port < 65535 else 5001}."
            ) from None
    # Without job execution the server takes two processes instead of ten.
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"], settings


def check_uri(uri: str, runs_root: str | Path) -> None:
    """Check before a run starts that MLflow is installed and that the store at ``uri`` answers.

    Raises:
        TrackingError: it is not; the message names `tracking.uri`, the value and the fix.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise TrackingError(
            "tracking.mlflow is true, but MLflow is not installed; "
            "install it with `pip install 'bessemer[tracking]'` or set tracking.mlflow to false"
        )
    scheme = uri.partition(":")[0].partition("+")[0]
    if uri.startswith(_SQLITE):
        _check_sqlite(uri, Path(resolve_uri(uri, runs_root).removeprefix(_SQLITE)))
    elif scheme in _HTTP:
        _check_server(uri)
    elif scheme in _DATABASE_PORTS:
        if uri.startswith((_POSTGRESQL, f"postgresql+{_DRIVER}:")) and importlib.util.find_spec(_DRIVER) is None:
            raise TrackingError(
                f"tracking.uri {redact(uri)!r}: {_DRIVER} is not installed; `pip install 'bessemer[postgresql]'`"
            )
        host, port = _host_and_port(uri, _DATABASE_PORTS[scheme])
        try:
            socket.create_connection((host, port), timeout=_TIMEOUT).close()
        except OSError as error:
            raise _refusal(uri, f"nothing answers at {host}:{port} ({_reason(error)})") from None
    else:
        raise _refusal(uri, "not an address that Bessemer knows")


def _refusal(uri: str, problem: str) -> TrackingError:
    return TrackingError(
        f"tracking.uri {redact(uri)!r}: {problem}; use sqlite:///FILE.db, http(s)://HOST:PORT of an MLflow server "
        "that runs, or postgresql://..., or set tracking.mlflow to false"
    )


def _reason(error: Exception) -> str:
    """The inner reason of a connection failure, in one line."""
    inner = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return " ".join(str(inner).split())[:200]


def _check_sqlite(uri: str, path: Path) -> None:
    if not path.name or "?" in str(path):
        raise _refusal(uri, "names no database file")
    if path.is_dir():
        raise _refusal(uri, f"{path} is a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("r+b") as file:
                start = file.read(16)
            if start and start != b"SQLite format 3\0":
                raise _refusal(uri, f"{path} is not an SQLite database")
    except OSError as error:
        raise _refusal(uri, f"cannot write {path} ({_reason(error)})") from None
    if not os.access(path.parent, os.W_OK):  # SQLite keeps its log beside the database
        raise _refusal(uri, f"cannot write in {path.parent} (no permission)")


def _check_server(uri: str) -> None:
    _host_and_port(uri, 0)
    try:
        # The scheme is http or https: `check_uri` saw to it.
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_TIMEOUT).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in (401, 403):  # alive, and it asks for credentials, which MLflow's client adds
            raise _refusal(uri, f"its /health answers {error.code}, so it is no MLflow server in order") from None
    except (OSError, ValueError) as error:
        raise _refusal(uri, f"no MLflow server answers ({_reason(error)})") from None


def _host_and_port(uri: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(uri)
        host, port = parts.hostname, parts.port or default_port
    except ValueError as error:
        raise _refusal(uri, f"malformed ({error})") from None
    if not host:
        raise _refusal(uri, "names no host")
    return host, port
