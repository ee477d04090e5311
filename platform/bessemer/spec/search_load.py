"""Reading search files, the job of each trial, and the check that no corner of the space is an illegal job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bessemer.errors import SpecError
from bessemer.spec.job import JobSpec
from bessemer.spec.load import load_job, load_spec, set_field
from bessemer.spec.search import SearchSpec
from bessemer.spec.space import Space

__all__ = [
    "check_corners",
    "describe_point",
    "dump_search",
    "judged_base",
    "load_base",
    "load_search",
    "search_schema",
    "trial_job",
]

_MOST_PROBLEMS = 10


def load_search(path: str | Path) -> SearchSpec:
    """Read a search file and check every rule that needs nothing but the file.

    Raises:
        SpecError: one line per problem, each with file and line, field, value, rule and fix.
    """
    return load_spec(path, SearchSpec, "search")


def load_base(search: SearchSpec, directory: Path) -> JobSpec:
    """The job that the search varies, as all its trials have in common.

    Args:
        search: the search.
        directory: where a relative `job` starts.

    Raises:
        SpecError: the job is illegal as it is, or cannot be part of a search.
    """
    path = directory / search.job
    job = load_job(path)
    upload = search.set.get("checkpoint.upload", job.checkpoint.upload)
    if upload is not None:
        raise SpecError(
            f"{path}: checkpoint.upload: {upload} has no use in a search, whose trials lie in its own directory; write "
            "set: {checkpoint.upload: null} in the search."
        )
    try:
        return set_field(job, _common(search))
    except SpecError as e:
        lines = "\n".join(f"{path} as the search sets it: {line}" for line in str(e).splitlines())
        raise SpecError(lines) from None


def _common(search: SearchSpec) -> dict[str, Any]:
    """What the search itself decides about the job of every trial."""
    metrics = [search.objective.metric, *(name for name in search.objective.also if name != "device_hours")]
    return {
        **search.set,
        "training.total_kimg": search.length_kimg,
        "resources.workers": search.workers,
        "evaluation.metrics": metrics,
        "evaluation.samples": search.samples_at(0),
        # The only evaluations are those at the rungs, where a trial stops to be judged.
        "evaluation.every_kimg": search.length_kimg,
        "evaluation.untrained": False,
        "evaluation.beside": False,
        "evaluation.stop_after_kimg": None,
        "evaluation.rollback_at": None,
        "checkpoint.keep_best": None,
        "checkpoint.keep_every_kimg": None,
        "checkpoint.upload": None,
    }


def judged_base(search: SearchSpec, base: JobSpec) -> JobSpec:
    """The base with every metric by which its trials are judged, the final one among them: what has to be checked.

    Raises:
        SpecError: the final metric breaks a rule of jobs.
    """
    if search.final is None or search.final.metric in base.evaluation.metrics:
        return base
    try:
        return set_field(base, {"evaluation.metrics": [*base.evaluation.metrics, search.final.metric]})
    except SpecError as e:
        raise SpecError("\n".join(f"final.metric: {line}" for line in str(e).splitlines())) from None


def trial_job(base: JobSpec, point: Mapping[str, Any], **fields: Any) -> JobSpec:
    """The job of a trial.

    Args:
        base: as :func:`load_base` gives it.
        point: values of the fields that are varied.
        fields: further fields, with `__` for dots: `seed`, `evaluation__samples`.

    Raises:
        SpecError: it breaks a rule of jobs.
    """
    return set_field(base, {**point, **{name.replace("__", "."): value for name, value in fields.items()}})


def check_corners(search: SearchSpec, base: JobSpec) -> None:
    """Check that every corner of the space is a legal job.

    Raises:
        SpecError: names the corners that are not, and the rules that they break.
    """
    base = judged_base(search, base)
    problems: dict[str, str] = {}
    corners = Space(search.space).corners()
    refused = 0
    for corner in corners:
        try:
            trial_job(base, corner)
        except SpecError as e:
            refused += 1
            for line in str(e).splitlines():
                problems.setdefault(line, describe_point(corner))
    if not problems:
        return
    lines = [f"space: at {corner}: {line}" for line, corner in problems.items()]
    if len(lines) > _MOST_PROBLEMS:
        lines = [*lines[:_MOST_PROBLEMS], f"... and {len(lines) - _MOST_PROBLEMS} more problems"]
    head = f"space: {refused} of {len(corners)} corners are no legal jobs; narrow the space, or add conditions (when):"
    raise SpecError("\n".join([head, *lines]))


def describe_point(point: Mapping[str, Any]) -> str:
    """A point of the space in one line."""
    return ", ".join(
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in point.items()
    )


def dump_search(search: SearchSpec) -> str:
    """The whole search as YAML, defaults included."""
    return yaml.safe_dump(search.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def search_schema() -> dict[str, Any]:
    """JSON Schema of search files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SearchSpec.model_json_schema()}
