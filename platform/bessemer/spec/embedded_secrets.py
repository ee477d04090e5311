"""Secrets that do not belong into a job file: it is copied into run directories, stores, reports and MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Secret", "find_secrets"]


class Secret(NamedTuple):
    """What was found, without the secret itself."""

    field: tuple[str, ...]
    what: str
    fix: str


_AWS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of the workers, or give the machines a role"
_ELSEWHERE = "set it in the environment of the workers, or in a file that only they can read"
_PASSWORDS = (
    "leave it out of the URL: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for an MLflow server, ~/.pgpass "
    "for PostgreSQL, the store's own variables for an object store"
)
_PATTERNS = (
    ("a password in a URL", re.compile(r"\w://[^/\s:@]*:[^/\s@]+@"), _PASSWORDS),
    ("the id of an AWS key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), _AWS),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), _ELSEWHERE),
    (
        "an access token",
        re.compile(
            r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|hf_[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,}"
            r"|AIza[\w-]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
        ),
        _ELSEWHERE,
    ),
    (
        "a signature or token in a URL",
        re.compile(
            r"[?&](?:X-Amz-Signature|X-Goog-Signature|sig|token|access_token|password|api_?key)=[^&\s]+", re.IGNORECASE
        ),
        _ELSEWHERE,
    ),
    (
        "a secret in a command",
        re.compile(
            r"(?:--?|\b)\w*(?:secret|password|passwd|token|api_?key)\w*[ =:]+(?![$\s])[^\s$]{6,}"
            r"|\bauthorization: *(?:bearer|basic) +(?!\$)\S{6,}",
            re.IGNORECASE,
        ),
        _ELSEWHERE,
    ),
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:password|passwd|secret|secret_access_key|access_key_id|api_key|auth_token)$", re.I
)


def find_secrets(value: Any, field: tuple[str, ...] = ()) -> Iterator[Secret]:
    """Look through a job, as YAML gives it, for what looks like a secret.

    Args:
        value: the job, or a part of it.
        field: where that part stands.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from find_secrets(inner, (*field, str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from find_secrets(inner, field)
    elif isinstance(value, str) and value:
        if field and _SECRET_NAME.search(field[-1]):
            yield Secret(field, "a secret by its name", _ELSEWHERE)
            return
        for what, pattern, fix in _PATTERNS:
            if pattern.search(value):
                yield Secret(field, what, fix)
                return
