"""A job file from the winner of a search, at the scale of the job that the search varied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from bessemer.errors import RunError
from bessemer.orchestration.search_directory import SearchDirectory
from bessemer.spec.job import JobSpec
from bessemer.spec.load import apply_overrides, set_field
from bessemer.spec.search_load import describe_point
from bessemer.tracking.search_journal import read_search

__all__ = ["promoted_job"]


def promoted_job(path: Path, trial: str | None, overrides: Sequence[str]) -> tuple[str, str]:
    """The job file of a trial, and one line that says which.

    Args:
        path: directory of the search.
        trial: its name; the best one when None.
        overrides: of fields of the job, `field.path=value`.

    Raises:
        RunError: there is no such trial, or none was judged yet.
        SpecError: an override breaks a rule.
    """
    directory = SearchDirectory.open(path)
    search, table = directory.search, read_search(directory.path)
    chosen = table.best(search.objective.mode)
    if trial is not None:
        chosen = next((known for known in table.trials.values() if known.name == trial), None)
        if chosen is None:
            raise RunError(f"--trial {trial}: {path} has no such trial; `bessemer search status {path}` lists them.")
    if chosen is None:
        raise RunError(f"{path}: no trial was judged yet; wait, or name one with --trial.")
    job = set_field(directory.original, {**search.set, **chosen.point, "name": f"{search.name}-{chosen.name}"})
    if overrides:
        job = apply_overrides(job, overrides)
    last, final = chosen.last, chosen.final
    value = "not judged" if last is None else f"{search.objective.metric} {last.value:.4g} at {last.kimg:g} kimg"
    if table.final_is_over and table.final is not None and final is not None and final.value is not None:
        value = f"{table.final.metric} {final.value:.4g} in the final, {value}"
    said = f"{chosen.name} ({value}): {describe_point(chosen.point)}"
    fields = job.model_dump(mode="json", exclude_defaults=True)
    order = [name for name in JobSpec.model_fields if name in fields]
    text = yaml.safe_dump({name: fields[name] for name in order}, sort_keys=False, allow_unicode=True, width=120)
    return f"# From the search {search.name}, trial {said}\n{text}", said
