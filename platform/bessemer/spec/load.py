"""Reading and writing job files: YAML, `--set` overrides, and errors that name the line and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bessemer.errors import SpecError
from bessemer.spec.embedded_secrets import find_secrets
from bessemer.spec.job import JobSpec

__all__ = ["apply_overrides", "dump_job", "job_schema", "load_job", "load_spec", "set_field"]

_FieldPath = tuple[str, ...]
Spec = TypeVar("Spec", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Plain YAML, except that keys are unique and `1e-4` is a number, as everybody means it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{name} appears twice (first in line {seen[name]}); keep one of them",
                    problem_mark=key.start_mark,
                )
            seen[name] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job file and check every rule that needs nothing but the job.

    Args:
        path: the YAML file.
        overrides: `field.path=value`, applied in order; values are YAML, so numbers, lists and null are typed.

    Raises:
        SpecError: one line per problem, each with file and line, field, value, rule and fix.
    """
    return load_spec(path, JobSpec, "job", overrides)


def load_spec(path: str | Path, model: type[Spec], what: str, overrides: Sequence[str] = ()) -> Spec:
    """Read a file of the model's fields; see :func:`load_job`.

    Args:
        path: the YAML file.
        model: what it describes.
        what: its name for people.
        overrides: as for :func:`load_job`.

    Raises:
        SpecError: one line per problem, each with file and line, field, value, rule and fix.
    """
    path = Path(path)
    fields, lines = _read(path, what)
    overridden = [_apply(fields, override) for override in overrides]
    _refuse_secrets(path, fields, lines, overridden, what)
    try:
        return model.model_validate(fields)
    except ValidationError as e:
        problems = [problem for error in e.errors() for problem in _explain(error, model, what)]
    raise SpecError("\n".join(f"{_place(path, field, lines, overridden)}: {text}" for field, text in problems))


def apply_overrides(job: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """The job with overrides, `field.path=value`, as on the command line.

    Raises:
        SpecError: one line per problem, each with field, value, rule and fix.
    """
    fields: dict[str, Any] = {}
    values = {}
    for override in overrides:
        where, _ = _apply(fields, override)
        value: Any = fields
        for part in where:
            value = value[part]
        values[".".join(where)] = value
    return set_field(job, values)


def set_field(job: JobSpec, values: Mapping[str, Any]) -> JobSpec:
    """The job with other values in some fields.

    Args:
        job: the job.
        values: field, with dots -> value.

    Raises:
        SpecError: one line per problem, each with field, value, rule and fix.
    """
    fields = job.model_dump(mode="json")
    for name, value in values.items():
        _put(fields, tuple(name.split(".")), value, name)
    try:
        return JobSpec.model_validate(fields)
    except ValidationError as e:
        problems = [text for error in e.errors() for _, text in _explain(error, JobSpec, "job")]
    raise SpecError("\n".join(problems))


def dump_job(job: JobSpec) -> str:
    """The whole job as YAML, defaults included, so that a later version reads the same job from it."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def job_schema() -> dict[str, Any]:
    """JSON Schema of job files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}


def _read(path: Path, what: str) -> tuple[dict[str, Any], dict[_FieldPath, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such {what} file; check the path, or see jobs/ for examples.") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a directory; name the {what} file in it.") from None
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: cannot be read as UTF-8 text ({e}).") from None
    try:
        fields = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 0
        raise SpecError(f"{path}:{line}: not valid YAML: {e.problem}.") from None
    except (yaml.YAMLError, ValueError) as e:
        raise SpecError(f"{path}: not valid YAML: {e}.") from None
    if not isinstance(fields, dict):
        found = "nothing" if fields is None else f"a {type(fields).__name__}"
        raise SpecError(f"{path}: holds {found}, but a {what} is a mapping of fields; start with `name: my-{what}`.")
    lines: dict[_FieldPath, int] = {}
    _number_lines(node, (), lines)
    return fields, lines


def _number_lines(node: yaml.Node | None, at: _FieldPath, lines: dict[_FieldPath, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        where = (*at, str(key.value))
        lines[where] = key.start_mark.line + 1
        _number_lines(value, where, lines)


def _apply(fields: dict[str, Any], override: str) -> tuple[_FieldPath, str]:
    name, equals, value = override.partition("=")
    where = tuple(name.strip().split("."))
    if not equals or not all(where):
        raise SpecError(f"--set {override}: expected field.path=value, such as --set training.total_kimg=10.")
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError):
        raise SpecError(f"--set {override}: {value!r} is not a YAML value; quote it as '\"{value}\"'.") from None
    _put(fields, where, parsed, f"--set {override}")
    return where, override


def _put(fields: dict[str, Any], where: _FieldPath, value: Any, origin: str) -> None:
    at = fields
    for depth, part in enumerate(where[:-1], start=1):
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise SpecError(f"{origin}: {'.'.join(where[:depth])} is a {type(at).__name__} and has no fields.")
    at[where[-1]] = value


def _place(
    path: Path, field: _FieldPath, lines: Mapping[_FieldPath, int], overridden: Sequence[tuple[_FieldPath, str]]
) -> str:
    for where, override in reversed(overridden):
        if field[: len(where)] == where:
            return f"--set {override}"
    for end in range(len(field), 0, -1):
        if field[:end] in lines:
            return f"{path}:{lines[field[:end]]}"
    return str(path)


def _refuse_secrets(
    path: Path,
    fields: dict[str, Any],
    lines: Mapping[_FieldPath, int],
    overridden: Sequence[tuple[_FieldPath, str]],
    what: str,
) -> None:
    """Before anything else, since other errors show the value that they are about."""
    hidden = [(where, f"{'.'.join(where)}=...") for where, _ in overridden]
    found = [
        f"{_place(path, secret.field, lines, hidden)}: {'.'.join(secret.field)}: holds {secret.what}, and a {what} "
        f"is copied to where others read it; {secret.fix}. If it was shared already, have it replaced."
        for secret in find_secrets(fields)
    ]
    if found:
        raise SpecError("\n".join(found))


def _explain(error: ErrorDetails, model: type[BaseModel], what: str) -> list[tuple[_FieldPath, str]]:
    """The field and the text of each problem that one pydantic error stands for."""
    where = tuple(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "value_error":
        rules = str(error["ctx"]["error"]).splitlines()
        return [((*where, *rule.partition(":")[0].split(".")), rule) for rule in rules]
    field, value = ".".join(where), error["input"]
    owner, info = _find(where, model)
    if error["type"] == "extra_forbidden":
        known = sorted(owner.model_fields) if owner else []
        close = difflib.get_close_matches(where[-1], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else _elsewhere(where[-1], model)
        section = ".".join(where[:-1]) or f"a {what}"
        return [(where, f"{field}: unknown field.{hint} Fields of {section}: {', '.join(known)}.")]
    meaning = f" {info.description}" if info is not None and info.description else ""
    if error["type"] == "missing":
        return [(where, f"{field}: is required and missing; add it.{meaning}")]
    return [(where, f"{field}: {_short(value)} is not allowed: {_rule(error)}.{meaning}")]


def _rule(error: ErrorDetails) -> str:
    if error["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        return "it must be a section with fields below it"
    if error["type"] == "string_pattern_mismatch":
        return "it must start with a letter or digit and hold only letters, digits, '.', '_' and '-', at most 64"
    return error["msg"].replace("Input should be", "it must be", 1)


def _short(value: Any) -> str:
    text = "an empty value" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _find(where: _FieldPath, model: type[BaseModel]) -> tuple[type[BaseModel] | None, Any]:
    """The section that owns the field at `where`, and pydantic's record of the field, where there is one."""
    owner: type[BaseModel] | None = model
    info: Any = None
    for depth, part in enumerate(where):
        if owner is None:
            break
        if part not in owner.model_fields:
            # A key of a mapping of sections, such as training.optimizers.<network>, stays in the same section.
            if info is not None and depth < len(where) - 1:
                continue
            return owner, None
        info = owner.model_fields[part]
        if depth < len(where) - 1:
            inner = _models(info.annotation)
            owner = inner[0] if inner else None
    return owner, info


def _elsewhere(name: str, root: type[BaseModel]) -> str:
    """Where a field lives that was written in the wrong section."""
    for section, info in root.model_fields.items():
        for model in _models(info.annotation):
            if name in model.model_fields:
                return f" It belongs in section {section!r}."
    return ""
