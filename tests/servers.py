"""Servers on loopback: an http server that breaks off as it is told, and S3 (moto)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "FaultServer", "S3Server", "fault_server", "s3_server"]


@dataclass(frozen=True)
class Fault:
    """What happens to one request."""

    kind: str
    """`drop` closes the connection in the body, `reset` resets it, `stall` sends no more for a while; a number is the
    status of an answer without the object; `replace` puts other bytes in the object's place and answers."""
    at: int = 0
    """Bytes of the body that are sent before."""
    data: bytes = b""
    """The other bytes."""
    header: tuple[str, str] | None = None
    """Sent with a status."""


@dataclass
class FaultServer:
    """Objects over http. A request for an object with faults gets the first of them, which is then over."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    body: str = "length"
    """How the end of a body is told: by its `length`, in `chunked` transfer, or by the `close` of the connection."""
    ranges: bool = True
    """Whether ranges are understood; otherwise every answer is the whole object."""
    versions: str = "etag"
    """`etag`, `weak`, `date` (Last-Modified alone), or `none`."""
    requests: list[tuple[str, int, str | None, int]] = field(default_factory=list)
    """Name, status, Range, bytes of the body that were sent, of each request."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Headers of each request, their names in small letters."""
    stall: float = 5.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answers(self, name: str) -> list[int]:
        """Statuses of the answers for an object."""
        return [status for asked, status, _, _ in self.requests if asked == name]

    def version_of(self, data: bytes) -> dict[str, str]:
        digest = hashlib.sha256(data).hexdigest()
        match self.versions:
            case "etag":
                return {"ETag": f'"{digest[:16]}"'}
            case "weak":
                return {"ETag": f'W/"{digest[:16]}"'}
            case "date":
                return {"Last-Modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(int(digest[:7], 16)))}
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait for an acknowledgement
    server: _Listener

    def do_GET(self) -> None:
        state = self.server.state
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range")
        with state._lock:
            faults = state.faults.get(name)
            fault = faults.pop(0) if faults else None
            state.headers.append({key.lower(): value for key, value in self.headers.items()})
            if fault is not None and fault.kind == "replace":
                state.objects[name], fault = fault.data, None
        if fault is not None and fault.kind.isdigit():
            self._end(name, int(fault.kind), asked, {} if fault.header is None else dict([fault.header]))
        elif name not in state.objects:
            self._end(name, 404, asked, {})
        elif self.headers.get("If-Match") not in (None, *state.version_of(state.objects[name]).values()):
            self._end(name, 412, asked, {})
        else:
            self._object(name, state.objects[name], asked, fault)

    def _end(self, name: str, status: int, asked: str | None, headers: dict[str, str]) -> None:
        self.server.state.requests.append((name, status, asked, 0))
        self.send_response(status)
        for header in ({"Content-Length": "0"} | headers).items():
            self.send_header(*header)
        self.end_headers()

    def _object(self, name: str, data: bytes, asked: str | None, fault: Fault | None) -> None:
        state = self.server.state
        version = state.version_of(data)
        wanted = self.headers.get("If-Range")
        status, start, stop, headers = 200, 0, len(data), dict(version)
        if asked is not None and state.ranges and (wanted is None or wanted in version.values()):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            if start >= len(data):
                self._end(name, 416, asked, {"Content-Range": f"bytes */{len(data)}"} | version)
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        body = data[start:stop]
        self.send_response(status)
        if state.body == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif state.body == "close":
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(len(body))
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        sent = body if fault is None else body[: fault.at]
        state.requests.append((name, status, asked, len(sent)))
        with contextlib.suppress(OSError):  # the reader has seen enough
            self._send(sent, whole=fault is None)
        if state.body == "close":
            self.close_connection = True
        if fault is not None:
            self._break(fault)

    def _send(self, body: bytes, *, whole: bool) -> None:
        if self.server.state.body != "chunked":
            self.wfile.write(body)
        else:
            for at in range(0, len(body), 50_000):
                piece = body[at : at + 50_000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if whole:
                self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _break(self, fault: Fault) -> None:
        if fault.kind == "stall":
            time.sleep(self.server.state.stall)
        elif fault.kind == "reset":
            time.sleep(0.02)  # let the bytes before it arrive
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    state: FaultServer

    def handle_error(self, *_: Any) -> None:
        """Readers hang up early, and connections are reset on purpose."""


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    """A server of objects over http, on a free port."""
    with _Listener(("127.0.0.1", 0), _Handler) as listener:
        listener.state = FaultServer(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield listener.state
        finally:
            listener.shutdown()
            thread.join()


@dataclass(frozen=True)
class S3Server:
    """S3 on loopback, with one bucket; credentials and address are in the environment meanwhile."""

    endpoint: str
    bucket: str = "bessemer-tests"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def client(self) -> Any:
        import boto3

        return boto3.client("s3")


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """moto as a server on a free port, and boto3's environment for it; what the buckets held before is gone."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    try:
        with mock.patch.dict(os.environ, environment):
            os.environ.pop("AWS_PROFILE", None)
            found = S3Server(environment["AWS_ENDPOINT_URL"])
            # What servers before it held lies in this process.
            urllib.request.urlopen(f"{found.endpoint}/moto-api/reset", data=b"").close()
            found.client().create_bucket(Bucket=found.bucket)
            yield found
    finally:
        server.stop()
