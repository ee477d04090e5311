#!/usr/bin/env python
"""Write the tables of docs/jobs.md from the JSON Schema of job files; a test holds that they are up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bessemer.spec.load import job_schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "jobs.md"
START, END = "<!-- fields: written by scripts/document_jobs.py -->", "<!-- end of fields -->"
WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def kind(facts: dict[str, Any]) -> str:
    """A field's type and bounds in words."""
    if "anyOf" in facts:
        return " or ".join(kind(option) for option in facts["anyOf"])
    if "enum" in facts or "const" in facts:
        return "one of " + ", ".join(f"`{value}`" for value in facts.get("enum", [facts.get("const")]))
    if "$ref" in facts:
        return "section " + facts["$ref"].rpartition("/")[2].removesuffix("Spec")
    if facts.get("type") == "array":
        inner = facts.get("items") or facts["prefixItems"][0]
        return f"list of {facts['maxItems']} {kind(inner)}s" if "maxItems" in facts else f"list of {kind(inner)}"
    if facts.get("type") == "object":
        return "settings of each network, by its name" if "$ref" in str(facts) else "fields of the system"
    limits = [f"{sign} {facts[key]:g}" for key, sign in BOUNDS.items() if key in facts and facts[key] < 2**62]
    return f"{WORDS[facts['type']]} {', '.join(limits)}".strip()


def table(section: dict[str, Any], prefix: str) -> list[str]:
    """One row per field."""
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, facts in section["properties"].items():
        if name in section.get("required", []):
            default = "required"
        elif isinstance(facts.get("default"), dict) or "default" not in facts:
            default = "empty"
        else:
            default = f"`{json.dumps(facts['default'])}`"
        meaning = " ".join(facts.get("description", "").split())  # a row is one line
        rows.append(f"| `{prefix}{name}` | {kind(facts)} | {default} | {meaning} |")
    return rows


def fields() -> str:
    """All tables: the job itself, then its sections in the order of the schema."""
    schema = job_schema()
    sections = {
        name: schema["$defs"][facts["$ref"].rpartition("/")[2]]
        for name, facts in schema["properties"].items()
        if "$ref" in facts
    }
    top = {**schema, "properties": {k: v for k, v in schema["properties"].items() if k not in sections}}
    lines = ["### The job", "", *table(top, "")]
    for name, section in sections.items():
        lines += ["", f"### `{name}`", "", section["description"], "", *table(section, f"{name}.")]
        for field, facts in section["properties"].items():
            for option in (facts, *facts.get("anyOf", [])):
                if "$ref" in option:
                    inner = schema["$defs"][option["$ref"].rpartition("/")[2]]
                    lines += ["", f"`{name}.{field}`: {inner['description']}", "", *table(inner, f"{name}.{field}.")]
        if name == "training":
            optimizer = schema["$defs"]["OptimizerSpec"]
            lines += ["", optimizer["description"], "", *table(optimizer, "training.optimizers.NETWORK.")]
    return "\n".join(lines)


def with_fields(page: str) -> str:
    """The page with its tables renewed."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{fields()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_fields(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
