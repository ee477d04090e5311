"""The model card of a snapshot: what it is, how good by which protocol, where it comes from, how to use it.

Mitchell et al., Model Cards for Model Reporting, FAT* 2019, arXiv:1810.03993: the sections that a run knows. What only
people know (intended use, limits, who is in the data) is asked for and left open.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bessemer.tracking.journal import PROTOCOL_FIELDS
from bessemer.tracking.ranking import PROTOCOL_LABELS, short
from bessemer.tracking.runs import Run, evaluation_curves, flatten

if TYPE_CHECKING:
    from bessemer.systems.snapshot import SnapshotInfo

__all__ = ["model_card"]

_ORIGIN = ("git_sha", "git_dirty", "bessemer", "python")


def model_card(run: Run, info: SnapshotInfo, *, brief: bool = False) -> str:
    """Markdown, with the header that model hubs read.

    Args:
        run: of the snapshot.
        info: what the snapshot says of itself.
        brief: one paragraph without a header.
    """
    from bessemer.systems.registry import get

    system = get(info.system)
    measured = [(curve, point) for curve in evaluation_curves(run) for point in curve.points if point.nimg == info.nimg]
    values = [f"{curve.metric} {point.value:.4g}" for curve, point in measured]
    found = ", ".join(values) or "not evaluated"
    sentence = f"{info.system} after {info.nimg / 1000:g} kimg of run {_plain(run.name)}; {found}."
    if brief:
        return sentence
    lines = ["---", "library_name: bessemer", f"tags: {json.dumps([info.system, system.family])}", "---", ""]
    lines += [f"# {_plain(run.name)}", "", sentence, "", "## Model", ""]
    lines += [f"- Method: {_plain(system.paper)}"]
    lines += [f"- Weights: `weights.safetensors`, fp32, sha256 `{info.weights_sha256}`"]
    average = ", ".join(f"{name} {value}" for name, value in flatten(info.ema))
    lines += [
        f"- Moving average of the weights: {_plain(average)}",
        f"- Images seen: {info.nimg}; seed {info.seed}",
        "",
    ]
    lines += ["| field | value |", "|---|---|"]
    lines += [f"| {_plain(name)} | {_plain(value)} |" for name, value in flatten(info.config)]
    lines += ["", "## Data", "", f"- Hash of the data set: `{info.data_hash}`"]
    lines += [f"- {sum(info.class_counts)} samples in {len(info.class_counts)} classes", "", "## Evaluation", ""]
    if measured:
        lines += ["| metric | value | standard error | measured by |", "|---|---|---|---|"]
    for curve, point in measured:
        record = curve.records[point.nimg]
        how = [
            f"{PROTOCOL_LABELS[n]} {short(n, record[n])}" for n in PROTOCOL_FIELDS if record.get(n) not in (None, "")
        ]
        error = "" if point.standard_error is None else f"{point.standard_error:.2g}"
        lines += [f"| {_plain(curve.metric)} | {point.value:.6g} | {error} | {_plain('; '.join(how))} |"]
    if not measured:
        lines += ["None of this snapshot."]
    lines += ["", "## Origin", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_plain(str(run.info[name]))} |" for name in _ORIGIN if name in run.info]
    lines += ["", "The job file, the journal and the report are artifacts of the MLflow run.", "", "## Use", ""]
    lines += ["```python", "from pathlib import Path", "from bessemer.systems.snapshot import load_snapshot", ""]
    lines += ['system, info = load_snapshot(Path("."))  # the directory of this card', "```", ""]
    lines += ["Intended use, limits, licence, and who is in the data: to be written by whoever publishes it."]
    return "\n".join(lines) + "\n"


def _plain(value: str) -> str:
    """Text that neither ends a cell nor begins markup."""
    kept = " ".join(value.split())
    for mark in "\\`*_<>|[]":
        kept = kept.replace(mark, f"\\{mark}")
    return kept[:500]
