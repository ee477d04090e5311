"""The report: one HTML file about one run or several, which needs no network, no server and no other file.

The page is data and a script. The data is JSON in an element that browsers do not execute, with `<` written so that it
cannot end that element; the script puts every text of it into the page as text, never as HTML. Behind that stands a
content security policy: the page may run one script, named by its hash, and may load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from bessemer import __version__
from bessemer.errors import RunError
from bessemer.files import write_atomically
from bessemer.tracking.report_data import report_data
from bessemer.tracking.runs import load_run

__all__ = ["render_page", "script_of", "write_report"]

_SCRIPTS = ("base.js", "chart.js", "samples.js", "report.js")


def write_report(run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run, or of several side by side, whole or not at all.

    Args:
        run_dirs: directory of the run, or several; they are only read, and nothing in them is trusted.
        out: the file to write; None writes report.html into the directory of the first.

    Returns:
        The file written.

    Raises:
        RunError: not a run directory, or the file cannot be written.
    """
    several = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    runs = [load_run(path) for path in several]
    path = runs[0].path / "report.html" if out is None else Path(out)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    try:
        page = render_page(f"{title} - Bessemer", report_data(runs)).encode("utf-8", errors="replace")
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise RunError(
            f"report {path}: cannot be written ({error.strerror}); choose another file with --out"
        ) from error
    return path


def render_page(title: str, data: dict[str, Any], scripts: Sequence[str] = _SCRIPTS, connect: str | None = None) -> str:
    """The page as text.

    Args:
        title: of the window.
        data: what the script draws.
        scripts: files of the package that make up the script, in order.
        connect: what the script may talk to, as a source of a content security policy; nothing if None.
    """
    script, style = script_of(scripts), asset("page.css")
    own = "'none'" if connect is None else connect
    pictures = "data:" if connect is None else f"data: {connect}"
    policy = (
        f"default-src 'none'; img-src {pictures}; media-src {pictures}; connect-src {own}; "
        f"style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    content = json.dumps(
        data | {"written": time.time(), "version": __version__}, separators=(",", ":"), allow_nan=False
    )
    # In an element that holds text until its end tag, `<` is the one character that matters.
    content = content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        "<body><noscript>This page draws itself: allow it to run its script. All numbers are in the runs' "
        "journal.jsonl.</noscript>"
        f'<script type="application/json" id="data">{content}</script>\n<script>{script}</script></body></html>\n'
    )


def script_of(names: Sequence[str]) -> str:
    """The script that these files make up."""
    return '"use strict";\n' + "\n".join(asset(name) for name in names)


def asset(name: str) -> str:
    """A file of the page."""
    return resources.files("bessemer.tracking").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
