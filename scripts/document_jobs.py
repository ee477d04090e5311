#!/usr/bin/env python
"""Write the tables of docs/jobs.md and docs/search.md from the JSON Schemas of their files; tests check them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bessemer.spec.load import job_schema
from bessemer.spec.search_load import search_schema

DOCS = Path(__file__).resolve().parent.parent / "docs"
JOBS, SEARCHES = DOCS / "jobs.md", DOCS / "search.md"
START, END = "<!-- fields: written by scripts/document_jobs.py -->", "<!-- end of fields -->"
WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
OBJECTS = {
    "OptimizerSpec": "settings of each network, by its name",
    "DimensionSpec": "choices or a range for each field",
    "True": "fields, by their names",
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
    if "type" not in facts:
        return "anything"
    if facts["type"] == "array":
        inner = facts.get("items") or facts.get("prefixItems", [{}])[0]
        return f"list of {facts['maxItems']} {kind(inner)}s" if "maxItems" in facts else f"list of {kind(inner)}"
    if facts.get("type") == "object":
        return next((words for part, words in OBJECTS.items() if part in str(facts)), "lists of values, by field")
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


def fields(schema: dict[str, Any], what: str) -> str:
    """All tables: the file itself, then its sections in the order of the schema."""
    sections = {
        name: schema["$defs"][option["$ref"].rpartition("/")[2]]
        for name, facts in schema["properties"].items()
        for option in (facts, *facts.get("anyOf", []))
        if "$ref" in option
    }
    top = {**schema, "properties": {k: v for k, v in schema["properties"].items() if k not in sections}}
    lines = [f"### The {what}", "", *table(top, "")]
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
    if "DimensionSpec" in schema["$defs"]:
        dimension = schema["$defs"]["DimensionSpec"]
        lines += ["", "### `space`", "", dimension["description"], "", *table(dimension, "space.FIELD.")]
    return "\n".join(lines)


def with_fields(page: str, what: str = "job") -> str:
    """The page with its tables renewed."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    schema = job_schema() if what == "job" else search_schema()
    return f"{before}{START}\n\n{fields(schema, what)}\n\n{END}{after}"


if __name__ == "__main__":
    for path, what in ((JOBS, "job"), (SEARCHES, "search")):
        path.write_text(with_fields(path.read_text(encoding="utf-8"), what), encoding="utf-8")
