#!/usr/bin/env python
"""Write docs/systems/: a page for each system, from its docstrings, presets and fields; a test compares them."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import torch
import yaml

from bessemer.evaluation.names import LIKELIHOODS, TARGETS
from bessemer.systems.contract import System
from bessemer.systems.likelihood import LikelihoodSystem
from bessemer.systems.registry import all_systems, build

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from document_jobs import table  # noqa: E402  # a script beside this one

FOLDER = ROOT / "docs" / "systems"


def prose(docstring: str) -> str:
    """A docstring as a paragraph of Markdown: literals keep their backticks, cross-references become names."""
    return inspect.cleandoc(docstring).replace(":class:", "").replace(":func:", "").replace(":meth:", "")


def presets(system: type[System]) -> list[str]:
    """Sizes of the networks of each preset, counted without memory."""
    rows: list[str] = []
    for name in system.presets:
        with torch.device("meta"):
            networks = build(system.name, name).networks()
        if not rows:
            rows = [f"| preset | {' | '.join(networks)} |", "|---" * (len(networks) + 1) + "|"]
        sizes = (f"{sum(p.numel() for p in network.parameters()):,}" for network in networks.values())
        extra = [""] * (rows[0].count("|") - 2 - len(networks))
        rows.append(f"| `{name}` | {' | '.join([*sizes, *extra])} |")
    return rows


def training(system: System) -> list[str]:
    """Stages, updates and optimizers of a preset."""
    lines, stages = [], system.stages()
    for stage, start in zip(stages, system.stage_starts(), strict=True):
        if len(stages) > 1:
            length = "to the end" if stage is stages[-1] else f"{stage.kimg:g} kimg"
            lines.append(f"Stage `{stage.name}`, {length}:")
        for update in system.updates(start):
            times = f"{update.repeats} times" if update.repeats > 1 else "once"
            often = f" in every {update.interval}th iteration" if update.interval > 1 else ""
            second = ", a second-order loss" if update.second_order else ""
            lines.append(f"- `{update.name}` steps `{update.network}` {times}{often}{second}.")
        lines.append("")
    for name, rule in system.optimizers().items():
        lines.append(f"- `{name}`: {rule.name}, learning rate {rule.lr:g}.")
    return lines


def jobs(name: str) -> list[str]:
    """Links to the job files that train a system."""
    found = []
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        if (yaml.safe_load(path.read_text(encoding="utf-8")).get("system") or {}).get("name") == name:
            first = path.read_text(encoding="utf-8").splitlines()[0]
            found.append(f"- [`{path.name}`](../../jobs/{path.name}): {first.lstrip('# ')}")
    return found


def page(name: str) -> str:
    """The page of one system."""
    system = all_systems()[name]
    module = inspect.getmodule(system)
    assert module is not None
    with torch.device("meta"):
        first = build(name, next(iter(system.presets)))
    source = Path(inspect.getfile(system)).relative_to(ROOT / "platform" / "bessemer" / "systems")
    likelihoods = [*LIKELIHOODS] if issubclass(system, LikelihoodSystem) else []
    targets = [*TARGETS] if "targets" in system.takes else []
    metrics = ", ".join([*(f"`{key}`" for key in (*likelihoods, *targets)), "all metrics of samples"])
    sampler = system.sample_for if system.given else system.sample
    lines = [
        f"# {name}", "",
        "<!-- written by scripts/document_systems.py -->", "",
        prose(system.__doc__ or ""), "",
        f"Family: {system.family}. Data: {system.modality}. Metrics: {metrics}.", "",
        f"Paper: {system.paper}.", "",
        prose(module.__doc__ or ""), "",
        f"Source: [`systems/{source}`](../../platform/bessemer/systems/{source})", "",
        "## Presets", "", "Parameters of each network.", "", *presets(system), "",
        f"## Training, as preset `{next(iter(system.presets))}` has it", "", *training(first), "",
        "## Sampling", "", prose(sampler.__doc__ or System.sample.__doc__ or ""), "",
        "## Fields", "", f"Of `system.config` in a job. {prose(system.Config.__doc__ or '')}", "",
        *table(system.Config.model_json_schema(), ""), "",
        "## Jobs", "", *jobs(name), "",
    ]  # fmt: skip
    return "\n".join(lines)


def index() -> str:
    """The page that lists all others."""
    rows = ["| system | family | data | |", "|---|---|---|---|"]
    for name, system in all_systems().items():
        summary = prose(system.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"| [{name}]({name}.md) | {system.family} | {system.modality} | {summary} |")
    note = "One page for each system: what it is, its presets and their sizes, its fields, its jobs."
    return "\n".join(["# Systems", "", "<!-- written by scripts/document_systems.py -->", "", note, "", *rows, ""])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.md"):
        stale.unlink()
    (FOLDER / "README.md").write_text(index(), encoding="utf-8")
    for key in all_systems():
        (FOLDER / f"{key}.md").write_text(page(key), encoding="utf-8")
