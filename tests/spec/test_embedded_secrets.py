"""Secrets in job files are refused, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from bessemer.errors import SpecError
from bessemer.spec.embedded_secrets import find_secrets
from bessemer.spec.load import load_job

JOB = """
name: small
system: {name: biggan, preset: tiny32}
data: {path: data}
training: {total_kimg: 1, batch_size: 16, slice_size: 8}
"""
KEY = "AKIA" + "IOSFODNN7EXAMPLE"
SECRETS = [
    (
        "tracking.uri=postgresql://me:hunter2secret@db/mlflow",
        "hunter2secret",
        r"tracking\.uri: holds a password",
    ),
    ("tracking.uri=https://me:hunter2secret@mlflow.example.org", "hunter2secret", "MLFLOW_TRACKING_PASSWORD"),
    ("checkpoint.upload=s3://:hunter2secret@bucket/runs", "hunter2secret", r"checkpoint\.upload: holds a password"),
    (f"data.path={KEY}", KEY, "id of an AWS key,.* set AWS_ACCESS_KEY_ID"),
    ("data.path=https://h/x?X-Amz-Signature=abcdef0123", "abcdef0123", "signature or token in a URL"),
    ("data.path='pipe:curl -H \"Authorization: Bearer abcdef0123\" h/{name}'", "abcdef0123", "secret in a command"),
    ("data.path='pipe:AWS_SECRET_ACCESS_KEY=abcdef0123 get {name}'", "abcdef0123", "secret in a command"),
    (f"name=hf_{'a1B2' * 8}", "a1B2a1B2", "access token"),
    (f"name=ghp_{'a1B2' * 9}", "a1B2a1B2", "access token"),
    ("system.config.api_key=abcdef0123", "abcdef0123", "a secret by its name"),
    ("aws_secret_access_key=abcdef0123", "abcdef0123", "a secret by its name"),
]


@pytest.mark.parametrize(("override", "secret", "message"), SECRETS, ids=range(len(SECRETS)))
def test_secrets_are_refused_and_not_repeated(tmp_path: Path, override: str, secret: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    with pytest.raises(SpecError, match=message) as caught:
        load_job(path, [override, "training.total_kimg=wrong"])
    assert secret not in str(caught.value)
    assert str(caught.value).startswith(f"--set {override.partition('=')[0]}=...: ")


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"{JOB}tracking:\n  uri: http://a:bcdefgh@h\n")
    with pytest.raises(SpecError, match=rf"^{path}:7: tracking\.uri: holds a password"):
        load_job(path)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/runs/token-ring",
        "http://127.0.0.1:5000",
        "postgresql://me@db:5432/mlflow",
        "/data/AKIATA/secret/passwords",
        'pipe:curl -H "Authorization: Bearer $TOKEN" https://h/{name}',
        "pipe:curl --password-file /run/pw https://h/{name}",
        "/data/tokens/images",
        "gs://bucket/a@b:c",
    ],
)
def test_ordinary_values_are_not_secrets(value: str) -> None:
    assert list(find_secrets({"data": {"path": value}})) == []


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "jobs").glob("**/*.yaml")), ids=str)
def test_our_own_jobs_hold_none(path: Path) -> None:
    import yaml

    assert list(find_secrets(yaml.safe_load(path.read_text()))) == []
