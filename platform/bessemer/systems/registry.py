"""Finds every system in the rooms of this package: a new file is enough to add one."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from bessemer import systems as _rooms
from bessemer.errors import SpecError
from bessemer.systems.contract import BaseConfig, System

__all__ = ["all_systems", "build", "check_data", "get", "rebuild", "resolve_config"]


@cache
def all_systems() -> dict[str, type[System]]:
    """Name -> class of every system, sorted by name."""
    found: dict[str, type[System]] = {}
    for room in pkgutil.iter_modules(_rooms.__path__, f"{_rooms.__name__}."):
        if not room.ispkg:
            continue
        package = importlib.import_module(room.name)
        for info in pkgutil.iter_modules(package.__path__, f"{room.name}."):
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, System) and value.__module__ == info.name:
                    name = getattr(value, "name", None)
                    if name is None:
                        continue
                    assert name not in found, f"two systems are named {name}"
                    found[name] = value
    return dict(sorted(found.items()))


def _choice(kind: str, value: str, options: list[str], field: str) -> str:
    close = difflib.get_close_matches(value, options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{field}: there is no {kind} named {value!r}.{hint} Known: {', '.join(options)}."


def get(name: str) -> type[System]:
    """The system's class.

    Raises:
        SpecError: no system has this name.
    """
    known = all_systems()
    if name not in known:
        raise SpecError(_choice("system", name, list(known), "system.name"))
    return known[name]


def resolve_config(
    name: str, preset: str, overrides: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None
) -> BaseConfig:
    """The configuration that a job means: preset, then what the data set says, then the job's own fields.

    Args:
        data: facts of the data set (`resolution`, `channels`, `classes`, ...); those in the system's `data_fields` are
            taken over, others that the configuration has must agree.

    Raises:
        SpecError: unknown system, preset or field, an illegal value, or a data set that does not fit.
    """
    cls = get(name)
    if preset not in cls.presets:
        raise SpecError(_choice(f"preset of {name}", preset, list(cls.presets), "system.preset"))
    overrides = dict(overrides or {})
    known = list(cls.Config.model_fields)
    for key in overrides:
        if key not in known:
            raise SpecError(_choice(f"field of {cls.Config.__name__}", key, known, f"system.config.{key}"))
    data = dict(data or {})
    fields = {**cls.presets[preset], **{k: v for k, v in data.items() if k in cls.data_fields}, **overrides}
    try:
        config = cls.Config.model_validate(fields)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(["system.config", *map(str, first["loc"])])
        raise SpecError(f"{where}: {first['msg']} (value {first['input']!r}).") from None
    for key, value in data.items():
        if key in known and getattr(config, key) != value:
            fix = f"pack the data with --size {getattr(config, key)}" if key == "resolution" else "change one of them"
            raise SpecError(
                f"system.config.{key}: {name} preset {preset} expects {getattr(config, key)}, "
                f"but the data set has {value}; {fix}."
            )
    return config


def build(
    name: str, preset: str, overrides: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None
) -> System:
    """Build a system; see :func:`resolve_config`. Weights mean nothing until `init_weights` or a load."""
    cls = get(name)
    return cls(resolve_config(name, preset, overrides, data))


def check_data(system: System, fields: Mapping[str, Sequence[int]], place: str) -> None:
    """Check that a data set has what a system's losses read.

    Args:
        system: built by the facts of the data set.
        fields: name -> shape of what a batch of the data set holds.
        place: of the data set, for messages.

    Raises:
        SpecError: it has other fields, or of other shapes.
    """
    wanted = {name: tuple(shape) for name, shape in system.batch_shapes.items()}
    found = {name: tuple(shape) for name, shape in fields.items()}
    if wanted == found:
        return
    fix = (
        f"name a data set of {' and '.join(wanted)}, or a system that takes {' and '.join(found)}"
        if wanted.keys() != found.keys()
        else "pack the data in that shape, or change system.config"
    )
    raise SpecError(f"data.path: {place} has {_listed(found)}, but {system.name} takes {_listed(wanted)}; {fix}.")


def _listed(fields: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in fields.items())


def rebuild(name: str, config: Mapping[str, Any]) -> System:
    """The system of a stored name and whole configuration. Weights mean nothing until a load.

    Raises:
        SpecError: this version does not know the system.
        ValidationError: or not this configuration of it.
    """
    cls = get(name)
    return cls(cls.Config.model_validate(config))
