"""The board: the report of all runs of a store, live in a browser. Read-only; it reads journals and changes nothing.

The page asks again every few seconds, and gets an answer of no content while nothing has changed. It listens on this
machine alone unless it is told otherwise, and then wants a token. The name that a browser calls it by is checked, too:
a web site that points its own name at 127.0.0.1 gets nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from bessemer.errors import MachineError, RunError
from bessemer.tracking.index import RunIndex
from bessemer.tracking.journal import PROTOCOL_FIELDS
from bessemer.tracking.pictures import Media, read_media
from bessemer.tracking.report import render_page
from bessemer.tracking.report_data import report_data
from bessemer.tracking.runs import load_run
from bessemer.tracking.summary import CurveSummary, RunSummary
from bessemer.tracking.tables import differing

__all__ = ["board_app", "is_loopback", "serve"]

_SCRIPTS = ("base.js", "chart.js", "samples.js", "report.js", "board.js")
_COOKIE = "bessemer_board"
_MOST_RUNS = 12
_SPARKS = 16
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def board_app(root: Path, token: str | None = None) -> Starlette:
    """The board of the store at `root`.

    Args:
        root: directory that holds the runs.
        token: what a browser has to bring once, as `?token=`; without one, only names of this machine are answered.
    """
    index = RunIndex(root)

    def page(request: Request) -> Response:  # noqa: ARG001
        # What is known already: a store that was never read must not keep the page waiting.
        data = {"board": True, "root": str(root.absolute()), **_rows(index.kept_rows())}
        return HTMLResponse(render_page(f"{root.absolute().name} - Bessemer", data, _SCRIPTS, connect="'self'"))

    def rows(request: Request) -> Response:
        try:
            return _unless_known(request, _rows(index.rows()))
        except RunError as error:
            return JSONResponse({"error": str(error)}, status_code=500)

    def report(request: Request) -> Response:
        names = request.query_params.getlist("run")[:_MOST_RUNS]
        known = {row.name for row in index.rows() if row.state != "broken"}
        if not names or not known.issuperset(names):
            return JSONResponse({"error": f"no such run: {', '.join(sorted(set(names) - known))}"}, status_code=404)
        runs = [load_run(root / name) for name in names]
        links = {run.path.resolve(): quote(run.name, safe="") for run in runs}

        def link(media: Media) -> str:
            place, name = next((place, name) for place, name in links.items() if media.path.is_relative_to(place))
            version = hashlib.sha256(media.data).hexdigest()[:12]  # a picture that changes has another address
            return f"/pictures/{name}/{quote(str(media.path.relative_to(place)))}?v={version}"

        return _unless_known(request, report_data(runs, link))

    def picture(request: Request) -> Response:
        name = request.path_params["run"]
        if name in ("", ".", "..") or "/" in name:
            return PlainTextResponse("no such run", status_code=404)
        found = read_media(root / name, request.path_params["path"])
        if found is None:
            return PlainTextResponse("no such picture", status_code=404)
        return Response(found.data, media_type=found.type, headers={"Cache-Control": "private, max-age=86400"})

    routes = [
        Route("/", page),
        Route("/favicon.ico", lambda request: Response(status_code=204)),
        Route("/rows", rows),
        Route("/report", report),
        Route("/pictures/{run}/{path:path}", picture),
    ]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guard(token))])


def serve(root: Path, host: str, port: int, token: str | None, ready: Callable[[str], object]) -> None:
    """Serve the board until Ctrl-C.

    Args:
        root: directory that holds the runs.
        host: address to listen on.
        port: port to listen on; 0 for any that is free.
        token: see :func:`board_app`; made here if `host` is not loopback and none is given.
        ready: told the address to open, once it answers.

    Raises:
        MachineError: the address cannot be used.
        RunError: `root` is no directory.
    """
    import uvicorn

    if not root.is_dir():
        raise RunError(f"{root}: is no directory; give the directory that holds the runs with --root")
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise MachineError(
            f"--host {host} --port {port}: cannot be used ({error.strerror or error}); take another, such as "
            f"--port {port + 1 if 0 < port < 65535 else 6007}."
        ) from None
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    ready(f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else ""))
    config = uvicorn.Config(board_app(root, token), log_level="error", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _guard(token: str | None) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def check(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if token is None:
            if not is_loopback(request.url.hostname or ""):
                return PlainTextResponse("this board answers to 127.0.0.1 and localhost only", status_code=421)
        else:
            brought = request.query_params.get("token")
            if brought is not None and secrets.compare_digest(brought.encode(), token.encode()):
                clean = RedirectResponse(request.url.path, status_code=303)  # out of the address, and of histories
                clean.set_cookie(_COOKIE, token, httponly=True, samesite="strict", max_age=7 * 86400)
                return clean
            if not secrets.compare_digest(request.cookies.get(_COOKIE, "").encode(), token.encode()):
                return PlainTextResponse("open the address that `bessemer board` printed: it has the token", 401)
        response = await answer(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return check


def _unless_known(request: Request, content: dict[str, Any]) -> Response:
    """The content as JSON, or nothing if the page has it already."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("utf-8", errors="replace")
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, media_type="application/json", headers={"ETag": tag})


def _rows(rows: Sequence[RunSummary]) -> dict[str, Any]:
    """What the list shows, a tenth of what is known."""
    sound = [row for row in rows if row.state != "broken"]
    fields = [name for name in differing(sound) if name not in ("system.name", "system.preset")][:60]
    return {
        "rows": [_row(row, fields) for row in sound],
        "fields": fields,
        "broken": [[row.name, row.note or ""] for row in rows if row.state == "broken"],
    }


def _row(row: RunSummary, fields: Sequence[str]) -> dict[str, Any]:
    return {
        "name": row.name,
        "state": row.state,
        "system": " ".join(filter(None, (row.system, row.preset))),
        "kimg": row.kimg,
        "total_kimg": row.total_kimg,
        "img_per_s": row.img_per_s,
        "workers": row.workers,
        "restarts": row.restarts,
        "device_hours": row.device_hours,
        "created": row.created,
        "curves": [_curve(curve) for curve in row.curves],
        "fields": [row.job.get(name) for name in fields],
    }


def _curve(curve: CurveSummary) -> dict[str, Any]:
    text = json.dumps([curve.protocol.get(name) for name in PROTOCOL_FIELDS], default=str)
    step = max(1, len(curve.spark) // _SPARKS)
    return {
        "metric": curve.metric,
        "higher": curve.higher_is_better,
        "protocol": hashlib.sha256(text.encode()).hexdigest()[:8],
        "best": curve.best,
        "error": curve.standard_error,
        "kimg": curve.best_kimg,
        "last": curve.last,
        "spark": [[float(f"{x:.4g}"), float(f"{y:.4g}")] for x, y in curve.spark[::step]],
    }
