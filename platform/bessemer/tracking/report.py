"""The report of a run: one HTML file that needs no network, no server and no other file.

The page is put together from strings, each text through :func:`html.escape`: a template engine would come with
MLflow only, and a machine that only trains has no MLflow. A content security policy stands behind the escaping: the
page may run one script, named by its hash, and may load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape
from importlib import resources
from pathlib import Path

from bessemer import __version__
from bessemer.errors import RunError
from bessemer.files import write_atomically
from bessemer.tracking.figures import Marker, Scale, Series, chart, format_number, thin
from bessemer.tracking.journal import PROTOCOL_FIELDS, Record, finite
from bessemer.tracking.pictures import pictures_section
from bessemer.tracking.runs import (
    Curve,
    Point,
    Run,
    RunSummary,
    evaluation_curves,
    event_name,
    flatten,
    load_run,
    summarise,
)

__all__ = ["render_report", "write_report"]

_GROUPS = {
    "loss": "Losses",
    "scores": "Discriminator scores",
    "throughput": "Throughput",
    "throughput/mfu": "Model FLOP utilisation",
    "time": "Seconds per 1000 images, by part of the step",
    "gradient_norm": "Gradient norms",
}
_MOST_LINES = 6  # in one chart
_MARKED = frozenset(
    {
        "resumed",
        "worker_lost",
        "workers_lost",
        "restarted",
        "failed",
        "stopped",
        "preempted",
        "rolled_back",
        "collapse_suspected",
        "stopped_early",
    }
)
_MOST_EVENTS_UNFOLDED = 12
_PROTOCOL_LABELS = {
    "estimator": "computed with",
    "samples": "generated images",
    "reference_samples": "real images",
    "reference_hash": "reference",
    "extractor_sha256": "extractor's weights",
    "seed": "seed of latents",
    "balance": "classes as in",
    "weights": "weights sampled",
}


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        run_dir: directory of the run; it is only read, and nothing in it is trusted.
        out: the file to write; None writes report.html into the run directory.

    Returns:
        The file written.

    Raises:
        RunError: not a run directory, or the file cannot be written.
    """
    run = load_run(run_dir)
    path = run.path / "report.html" if out is None else Path(out)
    try:
        page = render_report(run).encode("utf-8", errors="replace")
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise RunError(
            f"report {path}: cannot be written ({error.strerror}); choose another file with --out"
        ) from error
    return path


def render_report(run: Run) -> str:
    """The page as text."""
    style, script = _asset("report.css"), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    summary, curves = summarise(run), evaluation_curves(run)
    end = max([run.nimg, *(record["nimg"] for record in run.records)]) / 1000
    x = Scale(0.0, end or summary.total_kimg or 1.0)
    markers = [Marker(event["nimg"] / 1000, event_name(event).replace("_", " ")) for event in run.events(*_MARKED)]
    sections = (
        pictures_section(run),
        _metrics_section(curves, x, markers),
        _training_section(run, x, markers),
        _events_section(run),
        _provenance_section(run),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} - Bessemer report</title><style>{style}</style></head><body>"
        f"{_header(run, summary, curves)}<main>{''.join(sections)}</main>"
        f"<footer>Written by Bessemer {escape(__version__)} on {_date(datetime.now(timezone.utc).timestamp())} "
        f"from {escape(str(run.path))} ({len(run.records)} records).</footer>"
        '<dialog id="zoom" aria-label="Enlarged picture"><img alt="">'
        '<form method="dialog"><button>Close</button></form></dialog>'
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("bessemer.tracking").joinpath("page", name).read_text(encoding="utf-8")


def _header(run: Run, summary: RunSummary, curves: list[Curve]) -> str:
    system = " ".join(filter(None, (summary.system, summary.preset))) or "unknown system"
    facts = [_progress_fact(summary), *_metric_facts(curves)]
    if summary.img_per_s is not None:
        facts.append(_fact("Images per second", format_number(summary.img_per_s), "median of the last lines"))
    if run.seconds is not None:
        facts.append(_fact("Wall time", _duration(run.seconds), "interruptions included"))
    if summary.workers is not None:
        restarts = f"{summary.restarts} restart{'' if summary.restarts == 1 else 's'}"
        facts.append(_fact("Workers", str(summary.workers), restarts))
    failed = run.events("failed")
    failure = ""
    if summary.state == "failed" and failed:
        failure = f'<p class="failure">{escape(str(failed[-1].get("error") or "The run failed."))}</p>'
    warning = "".join(f'<p class="warning">{escape(message)}</p>' for message in _open_warnings(run))
    return (
        f'<header><p class="eyebrow">Bessemer run</p><h1>{escape(run.name)}</h1>'
        f'<p class="subtitle"><span class="state {summary.state}">{summary.state}</span> &middot; {escape(system)}'
        f"{f' &middot; {_date(summary.created)}' if summary.created is not None else ''}</p>{failure}{warning}"
        f'<dl class="facts">{"".join(facts)}</dl></header>'
    )


def _open_warnings(run: Run) -> list[str]:
    """The last warning about each thing that has not recovered since."""
    last = {str(event.get("about")): event for event in run.events("warning", "recovered")}
    return [f"{about}: {event.get('message')}" for about, event in last.items() if event["event"] == "warning"]


def _progress_fact(summary: RunSummary) -> str:
    total = summary.total_kimg
    bar = ""
    if total is not None and total > 0:
        done = min(max(summary.kimg / total, 0.0), 1.0)
        bar = f'<progress max="1" value="{done:.4f}" aria-label="Progress"></progress>'
    of = f"of {format_number(total)} kimg" if total is not None else "kimg"
    return _fact("Images seen", f"{format_number(summary.kimg)} k", of, bar)


def _metric_facts(curves: list[Curve]) -> list[str]:
    """First and last value of each metric, by the protocol with the longest curve."""
    facts, seen = [], set()
    for curve in curves:
        if curve.metric in seen or not curve.points:
            continue
        seen.add(curve.metric)
        first, last, best = curve.points[0], curve.points[-1], curve.best
        shown = f'<span class="last">{format_number(last.value)}</span>'
        if len(curve.points) > 1:
            shown = f"{format_number(first.value)} &rarr; {shown}"
        direction = "higher" if curve.higher_is_better else "lower"
        detail = f"best {format_number(best.value)} at {format_number(best.nimg / 1000)} kimg, {direction} is better"
        facts.append(f'<div class="wide"><dt>{escape(curve.metric)}</dt><dd>{shown}<small>{detail}</small></dd></div>')
    return facts


def _fact(label: str, value: str, detail: str, extra: str = "") -> str:
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(detail)}</small>{extra}</dd></div>"


def _metrics_section(curves: list[Curve], x: Scale, markers: list[Marker]) -> str:
    if not curves:
        return '<section><h2>Metrics</h2><p class="empty">No evaluation yet.</p></section>'
    parts = ["<section><h2>Metrics</h2>"]
    for metric in dict.fromkeys(curve.metric for curve in curves):
        group = [curve for curve in curves if curve.metric == metric]
        if len(group) > 1:
            differing = [name for name in PROTOCOL_FIELDS if len({str(c.protocol.get(name)) for c in group}) > 1]
            names = ", ".join(_PROTOCOL_LABELS.get(name, name) for name in differing)
            parts.append(
                f'<p class="warning"><b>{escape(metric)}</b> was measured by {len(group)} protocols, which differ in: '
                f"{escape(names)}. Their values are not comparable, so each has a curve of its own.</p>"
            )
        parts += [_metric(curve, x, markers, number if len(group) > 1 else 0) for number, curve in enumerate(group, 1)]
    return "".join(parts) + "</section>"


def _metric(curve: Curve, x: Scale, markers: list[Marker], number: int) -> str:
    """One curve with its table and its protocol."""
    title = f"{curve.metric}, protocol {number}" if number else curve.metric
    has_band = any(point.standard_error for point in curve.points)
    notes = ["The band is plus and minus one standard error."] if has_band else []
    if curve.not_finite:
        notes.append(f"{curve.not_finite} evaluations gave no finite number.")
    drawn = chart(title, [Series("", thin(curve.points), dots=True)], x, markers, " ".join(notes))
    best = curve.best if curve.points else None
    rows = "".join(
        f"<tr{' class=best' if point is best else ''}>"
        f'<td class="number">{format_number(point.nimg / 1000)}</td>'
        f'<td class="number">{format_number(point.value)}</td>'
        f'<td class="number">{_plus_minus(point)}</td><td class="mark">{"best" if point is best else ""}</td></tr>'
        for point in curve.points
    )
    protocol = [("metric", curve.metric)] + [
        (_PROTOCOL_LABELS.get(name, name), _plain(curve.protocol.get(name)))
        for name in PROTOCOL_FIELDS
        if name in curve.protocol
    ]
    seconds = finite(curve.protocol.get("seconds"))
    if seconds is not None:
        protocol.append(("time of the last", _duration(seconds)))
    return (
        f'<div class="charts metrics">{drawn}</div><div class="panels"><div class="scroll"><table>'
        f'<thead><tr><th class="number">kimg</th><th class="number">{escape(curve.metric)}</th>'
        f'<th class="number">standard error</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<div><h3>Protocol</h3>{_pairs(protocol)}</div></div>"
    )


def _training_section(run: Run, x: Scale, markers: list[Marker]) -> str:
    """Charts of what the trainer logs, one for each prefix of the names."""
    lines: dict[str, list[Point]] = {}
    broken: dict[str, int] = {}
    for record in run.of_kind("metrics"):
        values = record.get("values")
        for name, item in values.items() if isinstance(values, dict) else ():
            value = finite(item)
            points = lines.setdefault(name, [])
            if value is None:
                broken[name] = broken.get(name, 0) + 1
            else:
                points.append(Point(record["nimg"], value))
    groups: dict[str, list[str]] = {}
    for name in lines:
        prefix = name if name in _GROUPS else name.partition("/")[0]
        groups.setdefault(prefix, []).append(name)
    if not groups:
        return '<section><h2>Training</h2><p class="empty">No training metrics yet.</p></section>'
    order = [prefix for prefix in _GROUPS if prefix in groups] + sorted(groups.keys() - _GROUPS.keys())
    charts = []
    for prefix in order:
        names = groups[prefix]
        title = _GROUPS.get(prefix, prefix)
        for start in range(0, len(names), _MOST_LINES):
            part = names[start : start + _MOST_LINES]
            series = [Series(_label(name), thin(sorted(lines[name], key=lambda p: p.nimg))) for name in part]
            count = sum(broken.get(name, 0) for name in part)
            note = f"{count} values were not finite and are left out." if count else ""
            charts.append(chart(title, series, x, markers, note))
    most = max(len(points) for points in lines.values())
    hint = "Dashed lines mark restarts and failures. " if markers else ""
    hint += "Each point is a mean of neighbouring lines of the journal, the band their range. " if most > 240 else ""
    hint += "Move over a chart, or focus it and use the arrow keys, to read values."
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div><p class="hint">{hint}</p></section>'


def _label(name: str) -> str:
    rest = name.partition("/")[2] or name
    return "images per second" if rest == "img_per_s" else rest.replace("_", " ")


def _events_section(run: Run) -> str:
    events = list(run.of_kind("event"))
    if not events:
        return '<section><h2>Events</h2><p class="empty">No events yet.</p></section>'
    start = run.records[0]["time"]
    rows = "".join(
        f'<tr><td class="when">{_date(event["time"])}</td><td class="number">{_duration(event["time"] - start)}</td>'
        f'<td class="number">{format_number(event["nimg"] / 1000)}</td>'
        f'<td class="event">{escape(event_name(event).replace("_", " "))}</td>'
        f'<td class="detail">{escape(_event_details(event))}</td></tr>'
        for event in events
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>time (UTC)</th><th class="number">after</th>'
        '<th class="number">kimg</th><th>event</th><th>details</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if len(events) > _MOST_EVENTS_UNFOLDED:
        table = f"<details><summary>{len(events)} events</summary>{table}</details>"
    return f"<section><h2>Events</h2>{table}</section>"


def _event_details(event: Record) -> str:
    known = ("kind", "nimg", "time", "event")
    fields = {name: value for name, value in event.items() if name not in known}
    return ", ".join(f"{name} {value}" for name, value in flatten(fields))[:1000]


def _provenance_section(run: Run) -> str:
    facts = [("run directory", str(run.path.absolute()))]
    for name, value in flatten(run.info):
        if name == "created" and (seconds := finite(run.info["created"])) is not None:
            facts.append((name, f"{_date(seconds)} UTC"))
        else:
            facts.append((name, value))
    if "data_hash" not in run.info and run.data_hash is not None:
        facts.append(("data_hash", run.data_hash))
    for keys in (("data", "path"), ("seed",), ("training", "batch_size"), ("training", "precision")):
        value = run.setting(*keys)
        if value is not None:
            facts.append((".".join(keys), _plain(value)))
    job = (
        f"<details><summary>job.yaml</summary><pre>{escape(run.job_text)}</pre></details>"
        if run.job_text.strip()
        else '<p class="empty">job.yaml is missing.</p>'
    )
    return f"<section><h2>Provenance</h2>{_pairs(facts)}{job}</section>"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="pairs">{rows}</dl>'


def _plain(value: object) -> str:
    return "none" if value is None else str(value)


def _plus_minus(point: Point) -> str:
    return "" if point.standard_error is None else f"&plusmn; {format_number(point.standard_error)}"


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return "?"


def _duration(seconds: float) -> str:
    total = max(0, round(seconds))
    hours, minutes = total // 3600, total // 60 % 60
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {total % 60:02d} s" if minutes else f"{total} s"
