"""Reaching the dashboard of a Ray cluster, through which jobs are submitted; and saying why it cannot be reached."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bessemer.errors import MachineError, SpecError

__all__ = ["auth_headers", "dashboard_url", "jobs_client"]

_DASHBOARD_PORT = 8265
_ANSWER_SECONDS = 10.0
_GCS_SECONDS = 20.0

# In a process of its own: Ray's client waits for a minute for what is no GCS, and cannot be told to hurry.
_ASK_GCS = """
import sys
from ray._raylet import GcsClient
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
found = GcsClient(address=sys.argv[1]).internal_kv_get(DASHBOARD_ADDRESS.encode(), KV_NAMESPACE_DASHBOARD)
print(found.decode() if found else "")
"""


def auth_headers() -> dict[str, str]:
    """HTTP header with the cluster's token, from where Ray looks for it; nothing where there is no token.

    Raises:
        MachineError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as e:
            raise MachineError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({e.strerror}); name the file.") from None
    default = Path.home() / ".ray" / "auth_token"
    if not token and not path and default.is_file():
        token = default.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def dashboard_url(address: str) -> str:
    """The dashboard's URL without a slash at its end, after it has answered and taken our token.

    Args:
        address: `http(s)://host[:port]`, or `host[:port]`; the port is 8265 unless it is given.

    Raises:
        SpecError: this is no address of a dashboard.
        MachineError: nothing, or something else, answers there, or it wants another token.
    """
    scheme, separator, rest = address.strip().rpartition("://")
    url = urlsplit(f"{scheme or 'http'}://{rest.rstrip('/')}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host, port = None, None
    if host is None or url.path or (separator and scheme not in ("http", "https")):
        raise SpecError(
            f"--address {address}: is no address of a Ray dashboard; write http://HOST:{_DASHBOARD_PORT}"
            + (" (ray:// is for Ray's client, which jobs do not need)." if scheme == "ray" else ".")
        )
    if port is None:
        port = 443 if url.scheme == "https" else _DASHBOARD_PORT
    netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    found = f"{url.scheme}://{netloc}"
    _check(address, found, host, port)
    return found


def jobs_client(url: str, seconds: tuple[float, float]) -> Any:
    """Ray's client for jobs, which has no limits of its own, and would wait for ever for a head that lost its power.

    Args:
        url: as :func:`dashboard_url` returns it.
        seconds: to connect, and to hear something then.
    """
    headers = auth_headers()
    # Ray chooses a mode as it is imported where none is set, and these variables win over what it is told.
    with _environment(RAY_AUTH_MODE="token" if headers else "disabled", RAY_API_SERVER_ADDRESS=url):
        from ray.job_submission import JobSubmissionClient

        client: Any = JobSubmissionClient(url, headers=headers)
    client._do_request = functools.partial(client._do_request, timeout=seconds)  # which `requests` gets
    return client


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables meanwhile: what this process starts later has an authentication of its own."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check(address: str, url: str, host: str, port: int) -> None:
    import requests

    try:
        socket.create_connection((host, port), _ANSWER_SECONDS).close()
    except OSError as e:
        raise MachineError(
            f"--address {address}: nothing answers at {host}:{port} ({e.strerror or e}); give the address of the "
            f"cluster's dashboard, port {_DASHBOARD_PORT} unless it was chosen otherwise."
        ) from None
    headers = auth_headers()
    try:
        answer = requests.get(f"{url}/api/version", headers=headers, timeout=_ANSWER_SECONDS, allow_redirects=False)
        is_ray = answer.status_code != 200 or "ray_version" in answer.json()
    except (requests.RequestException, ValueError):
        raise MachineError(_no_dashboard(address, f"{host}:{port}")) from None
    if answer.status_code == 401:
        what = "does not take the token" if headers else "wants a token, and there is none here"
        raise MachineError(
            f"--address {address}: the cluster {what}; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it."
        )
    if answer.status_code == 403:
        raise MachineError(
            f"--address {address}: the cluster refuses the token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to that "
            "of this cluster."
        )
    if answer.status_code != 200 or not is_ray:
        raise MachineError(_no_dashboard(address, f"{host}:{port}"))


def _no_dashboard(address: str, place: str) -> str:
    """What to say when something answers that is no dashboard: mostly it is the port that workers join by."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_GCS, place],
            capture_output=True,
            text=True,
            timeout=_GCS_SECONDS,
            check=False,
            env={**os.environ, "RAY_AUTH_MODE": "token" if auth_headers() else "disabled"},
        )
        dashboard, is_gcs = done.stdout.strip(), done.returncode == 0 or "InvalidAuthToken" in done.stderr
    except subprocess.TimeoutExpired:
        dashboard, is_gcs = "", False
    what = (
        "is the port that nodes join by (GCS), not the dashboard" if is_gcs else "is not the dashboard of a Ray cluster"
    )
    right = f"http://{dashboard}" if dashboard else f"http://HOST:{_DASHBOARD_PORT} unless it was chosen otherwise"
    return f"--address {address}: {place} {what}; jobs are submitted to {right}."
