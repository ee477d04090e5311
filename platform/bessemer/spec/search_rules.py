"""Rules of a search that need nothing but its file. :mod:`bessemer.spec.search_load` checks it against its job."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from bessemer.spec.space import Space

if TYPE_CHECKING:
    from bessemer.spec.search import DimensionSpec, SearchSpec

__all__ = ["check_search"]

_NOT_VARIED = {
    "name": "the search names its trials",
    "seed": "all trials have the same seeds; set seeds of the search",
    "data.path": "trials on different data cannot be compared",
    "evaluation": "trials that are judged differently cannot be compared",
    "tracking": "it changes nothing about a trial",
    "checkpoint": "it changes nothing about a trial",
    "resources": "set workers of the search, or resources in the job",
    "training.total_kimg": "all trials have the same length, the last of objective.rungs_kimg",
}
_FIXED_WHILE_TRAINING = ("system", "data", "training.batch_size", "training.slice_size")
"""What a checkpoint may not change: the run would be another one."""
_POPULATION = ("pbt", "pb2")
_EVEN_RUNGS = ("hyperband", "bohb", "pbt", "pb2")


def check_search(search: SearchSpec) -> None:
    """Check every rule and report all that are broken.

    Raises:
        ValueError: one line per broken rule, each as ``field.path: value, rule, fix``.
    """
    rules = (_dimension_rules, _field_rules, _objective_rules, _final_rules, _scheduler_rules, _searcher_rules)
    broken = [line for rule in rules for line in rule(search)]
    if broken:
        raise ValueError("\n".join(broken))


def _under(field: str, sections: object) -> str | None:
    """Which of `sections` a field belongs to."""
    return next((s for s in sections if field == s or field.startswith(f"{s}.")), None)  # type: ignore[attr-defined]


def _dimension_rules(search: SearchSpec) -> Iterator[str]:
    for field, dimension in search.space.items():
        yield from _range_rules(f"space.{field}", dimension)
        for parent, values in dimension.when.items():
            options = search.space[parent].choice if parent in search.space else None
            if options is None:
                known = [name for name, other in search.space.items() if other.choice is not None and name != field]
                yield (
                    f"space.{field}.when: {parent!r} is no field of the space with choices; name one of: "
                    f"{', '.join(known) or '(there is none)'}."
                )
            elif parent == field or field in search.space[parent].when:
                yield f"space.{field}.when: {parent!r} depends on {field} in turn; remove one of the two."
            else:
                for value in values:
                    if value not in options:
                        yield f"space.{field}.when: {value!r} is no choice of {parent}; it has {list(options)}."


def _range_rules(at: str, dimension: DimensionSpec) -> Iterator[str]:
    given = [kind for kind in ("choice", "uniform", "loguniform") if getattr(dimension, kind) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "nothing"
        yield f"{at}: says {found}; give exactly one of choice, uniform and loguniform."
        return
    if dimension.choice is not None and not dimension.choice:
        yield f"{at}.choice: is empty; name at least one value."
    if (strange := _strange(dimension.choice)) is not None:
        yield f"{at}.choice: {strange}"
    if dimension.step is not None and dimension.uniform is None:
        yield f"{at}.step: {dimension.step:g} belongs to uniform, not to {given[0]}; remove it, or write choice."
    bounds = dimension.uniform or dimension.loguniform
    if bounds is None:
        return
    low, high = bounds
    if low >= high:
        yield f"{at}.{given[0]}: [{low:g}, {high:g}] has its upper end not above the lower; swap them, or write choice."
    if dimension.loguniform is not None and low <= 0:
        yield f"{at}.loguniform: [{low:g}, {high:g}] reaches 0, which has no logarithm; raise the lower end."
    if dimension.step is not None and low < high:
        steps = (high - low) / dimension.step
        if abs(steps - round(steps)) > 1e-9:
            last = low + math.floor(steps) * dimension.step
            yield f"{at}.step: {dimension.step:g} does not lead from {low:g} to {high:g}; set the end to {last:g}."


def _strange(value: object) -> str | None:
    """What of a value cannot be written down again, in words; None if all of it can."""
    if value is None or isinstance(value, str | bool | int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is not finite; write a number that is."
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_strange, value)), None)
    return f"{value!r} is no text, number, truth value, list or mapping; put it in quotes if it is a text."


def _field_rules(search: SearchSpec) -> Iterator[str]:
    for field, value in search.set.items():
        if (strange := _strange(value)) is not None:
            yield f"set.{field}: {strange}"
    for field in search.space:
        if (owner := _under(field, _NOT_VARIED)) is not None:
            yield f"space.{field}: cannot be varied: {_NOT_VARIED[owner]}."
        if field in search.set:
            yield f"space.{field}: is in set too; keep one of the two."
        if search.scheduler.name in _POPULATION and (fixed := _under(field, _FIXED_WHILE_TRAINING)):
            yield (
                f"space.{field}: {search.scheduler.name} changes settings while a trial is trained, and {fixed} must "
                "stay as it was in the checkpoint; vary training.optimizers, training.lr_schedule or ema, or use asha."
            )
    for field in ("name", "seed", "training.total_kimg", "resources.workers"):
        if field in search.set:
            yield f"set.{field}: the search sets it itself (objective.rungs_kimg, seeds, workers); remove it."


def _objective_rules(search: SearchSpec) -> Iterator[str]:
    rungs, objective = search.objective.rungs_kimg, search.objective
    if any(a >= b for a, b in itertools.pairwise(rungs)):
        yield f"objective.rungs_kimg: {list(rungs)} does not rise; order it, each moment once."
    elif search.scheduler.name in _EVEN_RUNGS and any(
        abs(kimg - rungs[0] * (index + 1)) > 1e-9 for index, kimg in enumerate(rungs)
    ):
        even = [round(rungs[0] * (index + 1), 6) for index in range(len(rungs))]
        yield (
            f"objective.rungs_kimg: {list(rungs)} is not evenly spaced, which {search.scheduler.name} needs; "
            f"write {even}."
        )
    samples = objective.samples
    if any(a > b for a, b in itertools.pairwise(samples)):
        yield f"objective.samples: {list(samples)} falls; later rungs have fewer trials and can afford more samples."
    if len(samples) > len(rungs):
        yield f"objective.samples: {len(samples)} numbers for {len(rungs)} rungs (objective.rungs_kimg); remove some."
    if objective.metric in objective.also or len(set(objective.also)) < len(objective.also):
        yield f"objective.also: {list(objective.also)} names an objective twice; keep it once."


def _final_rules(search: SearchSpec) -> Iterator[str]:
    final, objective = search.final, search.objective
    if final is None:
        return
    if final.metric == "device_hours":
        yield "final.metric: device_hours is no metric of what a trial generates; name one, such as fd_efflite0."
    if final.top > search.budget.trials:
        yield f"final.top: {final.top} finalists of {search.budget.trials} trials (budget.trials); lower it."
    if final.metric != objective.metric:
        return
    if final.mode != objective.mode:
        yield f"final.mode: {final.mode}, and objective.mode is {objective.mode} for the same metric; make them agree."
    at_last = search.samples_at(len(objective.rungs_kimg) - 1)
    if final.samples * final.draws <= at_last:
        yield (
            f"final.samples: {final.draws} x {final.samples} images say no more of {final.metric} than the {at_last} "
            "of the last rung (objective.samples); raise it, or name another metric."
        )


def _scheduler_rules(search: SearchSpec) -> Iterator[str]:
    scheduler, searcher = search.scheduler.name, search.searcher.name
    if (scheduler == "bohb") != (searcher == "bohb"):
        yield f"scheduler.name: {scheduler} with searcher.name {searcher}: bohb is both or neither; set both to bohb."
    if scheduler in _POPULATION:
        if searcher != "random":
            yield f"searcher.name: {searcher} has no use with {scheduler}, which moves settings itself; write random."
        if search.budget.trials < 2:
            yield f"budget.trials: {search.budget.trials} trial is no population; set it to 4 or more."
        if len(search.objective.rungs_kimg) < 2:
            yield "objective.rungs_kimg: has one moment, so nothing would ever be copied; name at least two."
    if scheduler == "pb2":
        for field, dimension in search.space.items():
            if dimension.choice is not None or dimension.step is not None or dimension.when:
                yield (
                    f"space.{field}: pb2 needs plain ranges; write uniform or loguniform without step and when, or use "
                    "pbt."
                )
    if search.objective.also and scheduler not in ("none", "asha", "median"):
        yield f"objective.also: {scheduler} judges by one objective; use asha, median or none, or remove it."


def _searcher_rules(search: SearchSpec) -> Iterator[str]:
    searcher, also = search.searcher.name, search.objective.also
    if also and searcher == "bohb":
        yield "objective.also: bohb looks for one objective; set searcher.name to tpe or gp."
    if searcher == "bohb":
        for field, dimension in search.space.items():
            if dimension.when:
                yield f"space.{field}.when: bohb knows no conditions; remove it, or use tpe with asha."
    if searcher != "grid":
        return
    endless = False
    for field, dimension in search.space.items():
        if dimension.choice is None and dimension.step is None:
            endless = True
            yield f"space.{field}: a grid needs values; write choice, or uniform with step, or another searcher."
    if not endless and next(_dimension_rules(search), None) is None:
        size = Space(search.space).grid_size()
        if size > search.budget.trials:
            yield f"budget.trials: {search.budget.trials} of the {size} points of the grid; set it to {size}."
