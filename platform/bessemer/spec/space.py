"""A space of hyper-parameters: its points, its corners, and steps inside it. Plain Python: job files need no numpy."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bessemer.spec.search import DimensionSpec

__all__ = ["Point", "Space", "encode", "is_whole"]

Point = dict[str, Any]
"""Field of the job -> its value, for the fields that are active at this point, in the order of the space."""

_MOST_CORNERS = 2048
_FACTORS = (0.8, 1.2)
"""Jaderberg et al. 2017, Population Based Training (arXiv:1711.09846), section 4.1: perturb by 1.2 or 0.8."""


def is_whole(dimension: DimensionSpec) -> bool:
    """Whether a range holds whole numbers only."""
    bounds = dimension.uniform or dimension.loguniform or ()
    return all(isinstance(v, int) for v in bounds) and (dimension.step is None or isinstance(dimension.step, int))


def encode(value: Any) -> str:
    """A choice as text, for libraries that know only plain categories; `json.loads` takes it back."""
    return json.dumps(value, sort_keys=True)


class Space:
    """The space that a search file describes. Conditions are looked at after the fields that they name."""

    def __init__(self, dimensions: Mapping[str, DimensionSpec]) -> None:
        self.dimensions: dict[str, DimensionSpec] = {}
        left = dict(dimensions)
        while left:
            ready = [name for name, d in left.items() if all(parent in self.dimensions for parent in d.when)]
            if not ready:
                raise ValueError(f"space: {', '.join(left)} depend on each other in a circle; remove a condition.")
            self.dimensions |= {name: left.pop(name) for name in ready}

    def is_active(self, field: str, point: Mapping[str, Any]) -> bool:
        """Whether a field is varied, as the fields before it stand in `point`."""
        when = self.dimensions[field].when
        return all(parent in point and point[parent] in values for parent, values in when.items())

    def draw(self, rng: Random) -> Point:
        """A random point."""
        point: Point = {}
        for field, dimension in self.dimensions.items():
            if self.is_active(field, point):
                point[field] = _draw(dimension, rng)
        return point

    def corners(self) -> list[Point]:
        """Points at which every range is at one of its ends; every combination, with every choice.

        Where there are more than 2048, those in which at most two fields differ from their first value.
        """
        full = list(itertools.islice(self._walk(_ends), _MOST_CORNERS + 1))
        if len(full) <= _MOST_CORNERS:
            return full
        found: dict[str, Point] = {}
        fields = list(self.dimensions)
        for pair in itertools.combinations(fields, min(2, len(fields))):
            for point in self._walk(_ends, only=set(pair)):
                found.setdefault(encode(point), point)
        return list(found.values())

    def grid(self) -> Iterator[Point]:
        """Every point of a space of choices and steps, in order."""
        return self._walk(_values)

    def grid_size(self) -> int:
        """Number of points of :meth:`grid`."""
        return sum(1 for _ in self.grid())

    def _walk(self, values: Any, only: set[str] | None = None) -> Iterator[Point]:
        """Every combination of the values of active fields; fields outside of `only` keep to their first."""
        fields = list(self.dimensions)

        def extend(index: int, point: Point) -> Iterator[Point]:
            if index == len(fields):
                yield dict(point)
                return
            field = fields[index]
            if not self.is_active(field, point):
                yield from extend(index + 1, point)
                return
            options = values(self.dimensions[field])
            for value in options if only is None or field in only else options[:1]:
                yield from extend(index + 1, {**point, field: value})

        return extend(0, {})

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether `point` lies in the space: the active fields and no others, each with a legal value."""
        seen: Point = {}
        for field, dimension in self.dimensions.items():
            if self.is_active(field, seen):
                if field not in point or not _is_legal(dimension, point[field]):
                    return False
                seen[field] = point[field]
        return set(seen) == set(point)

    def perturb(self, point: Mapping[str, Any], rng: Random, resample: float) -> Point:
        """A point near `point`: numbers times 0.8 or 1.2 inside their range, choices one place on, some drawn anew.

        Args:
            point: of this space.
            rng: where randomness comes from.
            resample: probability that a field is drawn anew.
        """
        new: Point = {}
        for field, dimension in self.dimensions.items():
            if not self.is_active(field, new):
                continue
            if field not in point or rng.random() < resample:
                new[field] = _draw(dimension, rng)
            else:
                new[field] = _step(dimension, point[field], rng)
        return new

    def within(self, field: str, value: float) -> Any:
        """The value of a range's field that is closest to `value`."""
        return _fit(self.dimensions[field], value)


def _ends(dimension: DimensionSpec) -> list[Any]:
    if dimension.choice is not None:
        return list(dimension.choice)
    return list(dimension.uniform or dimension.loguniform or ())


def _values(dimension: DimensionSpec) -> list[Any]:
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = dimension.uniform or (0, 0)
    step = dimension.step or 1
    return [low + index * step for index in range(round((high - low) / step) + 1)]


def _draw(dimension: DimensionSpec, rng: Random) -> Any:
    if dimension.choice is not None:
        return dimension.choice[rng.randrange(len(dimension.choice))]
    if dimension.loguniform is not None:
        low, high = dimension.loguniform
        return _fit(dimension, math.exp(rng.uniform(math.log(low), math.log(high))))
    if dimension.step is not None or is_whole(dimension):
        low, high = dimension.uniform or (0, 0)
        step = dimension.step or 1
        return low + rng.randrange(round((high - low) / step) + 1) * step
    return rng.uniform(*(dimension.uniform or (0.0, 0.0)))


def _step(dimension: DimensionSpec, value: Any, rng: Random) -> Any:
    if dimension.choice is not None:
        index = dimension.choice.index(value) + rng.choice((-1, 1))
        return dimension.choice[min(max(index, 0), len(dimension.choice) - 1)]
    moved = _fit(dimension, value * rng.choice(_FACTORS))
    if moved == value and (dimension.step is not None or is_whole(dimension)):
        moved = _fit(dimension, value + rng.choice((-1, 1)) * (dimension.step or 1))
    return moved


def _fit(dimension: DimensionSpec, value: float) -> Any:
    low, high = dimension.uniform or dimension.loguniform or (value, value)
    if dimension.step is not None:
        value = low + round((value - low) / dimension.step) * dimension.step
    value = min(max(value, low), high)
    return round(value) if is_whole(dimension) else float(value)


def _is_legal(dimension: DimensionSpec, value: Any) -> bool:
    if dimension.choice is not None:
        return value in dimension.choice
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isclose(_fit(dimension, value), value, rel_tol=1e-9, abs_tol=1e-12)
