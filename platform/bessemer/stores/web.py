"""Objects behind an http server; it is only read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from bessemer.errors import MachineError, StoreError
from bessemer.stores.reading import Answer, ResumingStore
from bessemer.stores.store import Patience, PerProcess, TransientError

__all__ = ["WebStore"]

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = 5


class WebStore(ResumingStore):
    """Objects below an http or https URL. Proxies are taken from the environment, as curl does.

    A query in the URL, such as a signature, goes with every request; user and password become basic authentication.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__(url, patience)
        self._parts = urlsplit(url)
        if not self._parts.hostname:
            raise StoreError(f"{self.name}: names no host; write https://HOST/PATH.")
        self._pool = PerProcess(self._make_pool)

    def _make_pool(self) -> Any:
        try:
            import urllib3
        except ImportError:
            raise MachineError(
                f"{self.name}: reading over http needs urllib3; pip install 'bessemer[stores]'."
            ) from None
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=self.patience.timeout, read=self.patience.timeout),
            "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS),
            "maxsize": 32,
        }
        proxy = getproxies().get(self._parts.scheme)
        if proxy and not proxy_bypass(self._parts.hostname or ""):
            return urllib3.ProxyManager(proxy, **options)
        return urllib3.PoolManager(**options)

    def _url(self, name: str) -> str:
        parts = self._parts._replace(netloc=self._parts.netloc.rpartition("@")[2], fragment="")
        path = f"{parts.path.rstrip('/')}/{quote(self.checked(name))}"
        return parts._replace(path=path).geturl()

    def _headers(self, start: int, stop: int | None, version: str | None) -> dict[str, str]:
        # Always a range: then the answer says the object's length, also where it comes without Content-Length.
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}", "Accept-Encoding": "identity"}
        if version is not None and not version.startswith("W/"):  # weak ETags may not be asked for
            headers["If-Range"] = version
        if self._parts.username is not None:
            from urllib3 import make_headers

            user = f"{unquote(self._parts.username)}:{unquote(self._parts.password or '')}"
            headers |= make_headers(basic_auth=user)
        return headers

    @contextlib.contextmanager
    def _open(self, name: str, start: int, stop: int | None, version: str | None) -> Iterator[Answer]:
        pool = self._pool.get()
        from urllib3.exceptions import HTTPError

        with self._transient(name):
            response = pool.request(
                "GET",
                self._url(name),
                headers=self._headers(start, stop, version),
                preload_content=False,
                decode_content=False,
            )
        try:
            yield self._answer(name, response, start)
        finally:
            # Returned to the pool when all was read; closed otherwise, because the rest is of no use.
            with contextlib.suppress(HTTPError, OSError):
                if response.length_remaining != 0:
                    response.close()
                response.release_conn()

    def _answer(self, name: str, response: Any, start: int) -> Answer:
        headers, status = response.headers, response.status
        version = headers.get("ETag") or headers.get("Last-Modified")
        if status == 416:
            total = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
            if total is None:
                raise self.failed(name, f"the server refuses bytes from {start} on", "it is not what it was")
            return Answer(lambda amount: b"", start, int(total[1]), version)
        if status not in (200, 206):
            self._refused(name, response)

        def read(amount: int) -> bytes:
            with self._transient(name):
                data: bytes = response.read1(amount)  # read() would lose what came before a drop
                return data

        chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        if status == 200:
            length = headers.get("Content-Length")
            return Answer(read, 0, int(length) if length and not chunked else None, version, chunked)
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if found is None:
            raise self.failed(
                name, f"the server sent Content-Range {headers.get('Content-Range')!r}", "use another one"
            )
        return Answer(read, int(found[1]), None if found[2] == "*" else int(found[2]), version)

    def _refused(self, name: str, response: Any) -> NoReturn:
        status, said = response.status, f"the server says {response.status} {response.reason or ''}".rstrip()
        if status in _BUSY:
            asked = response.headers.get("Retry-After", "")
            raise TransientError(said, float(asked) if asked.isdigit() else 0.0)
        if status in (404, 410):
            raise self.missing(name)
        if status in (401, 403, 407):
            raise self.failed(name, said, "check the signature, user or password in the URL, and what they may read")
        raise self.failed(name, said, "check the address")

    @contextlib.contextmanager
    def _transient(self, name: str) -> Iterator[None]:
        """Turn what urllib3 raises for a lost connection into TransientError."""
        from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError, SSLError

        try:
            yield
        except MaxRetryError as e:
            if e.reason is None or "redirect" in str(e.reason):
                raise self.failed(name, f"more than {_REDIRECTS} redirects", "check the address") from None
            if isinstance(e.reason, SSLError):
                raise self._insecure(name, e.reason) from None
            raise TransientError(_reason(e.reason)) from None
        except SSLError as e:
            raise self._insecure(name, e) from None
        except LocationValueError as e:
            raise self.failed(name, str(e), "check the address") from None
        except (HTTPError, OSError) as e:
            raise TransientError(_reason(e)) from None

    def _insecure(self, name: str, error: BaseException) -> StoreError:
        return self.failed(name, f"no secure connection ({error})", "check the address and the server's certificate")

    def _read_only(self, name: str) -> StoreError:
        return self.failed(name, "http stores can only be read", "write to a directory, s3:// or gs://")

    def put(self, name: str, path: Path) -> None:  # noqa: ARG002
        raise self._read_only(name)

    def list(self, prefix: str = "") -> dict[str, int]:
        raise self.failed(prefix, "http servers cannot be asked what they hold", "name the objects")

    def delete(self, name: str) -> None:
        raise self._read_only(name)


def _reason(error: BaseException) -> str:
    """What happened to a connection, in one line, without the objects that urllib3 puts in front."""
    cause = error
    while isinstance(inner := getattr(cause, "__cause__", None) or getattr(cause, "__context__", None), OSError):
        cause = inner
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    return re.sub(r"^<[^>]*>: |^\S*Connection\S*\([^)]*\): ", "", str(cause)) or type(cause).__name__
