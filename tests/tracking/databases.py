"""Stores that runs share: a real PostgreSQL and a real MLflow server, each in processes of its own, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bessemer.tracking.mlflow_store import server_command

__all__ = ["NO_POSTGRESQL", "POSTGRESQL", "free_port", "mlflow_server", "postgresql"]


def _binaries() -> Path | None:
    """Directory of `initdb` and `postgres`; Debian keeps them off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))
    return Path(found).resolve().parent if found else None


POSTGRESQL = _binaries()
NO_POSTGRESQL = "needs a PostgreSQL server: apt-get install postgresql"


def free_port() -> int:
    """A port of loopback that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Address of an empty database on a free port of loopback; everything is gone afterwards."""
    assert POSTGRESQL is not None, NO_POSTGRESQL
    directory = tempfile.mkdtemp(prefix="bsm-pg-", dir="/tmp")  # short: the path of its socket
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    if user is not None:
        shutil.chown(directory, user)
    data, port = f"{directory}/data", free_port()
    try:
        initdb = [POSTGRESQL / "initdb", "-D", data, "-U", "tests", "-A", "trust", "--no-sync", "--encoding=UTF8"]
        subprocess.run(initdb, check=True, capture_output=True, user=user, cwd=directory)
        settings = (f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={directory}")
        command = [POSTGRESQL / "postgres", "-D", data, *(word for one in settings for word in ("-c", one))]
        with (
            Path(directory, "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, user=user, cwd=directory) as process,
        ):
            try:
                ready = [POSTGRESQL / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
                while subprocess.run(ready, check=False).returncode:
                    assert process.poll() is None, Path(directory, "log").read_text()
                    time.sleep(0.1)
                yield f"postgresql://tests@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # does not wait for connections that are left open
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def mlflow_server(database: Path, port: int) -> Iterator[str]:
    """Address of an MLflow server for an SQLite file, once it answers; it is killed in the end, with its workers."""
    command, settings = server_command(f"sqlite:///{database}", port)
    command += ["--artifacts-destination", str(database.parent / "artifacts")]
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    with (
        database.with_suffix(".log").open("ab") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process,
    ):
        try:
            deadline = time.monotonic() + 180
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, database.with_suffix(".log").read_text()
                assert time.monotonic() < deadline, "MLflow's server does not start"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
