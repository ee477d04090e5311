import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bessemer.errors import SpecError
from bessemer.spec.job import JobSpec
from bessemer.spec.load import dump_job, job_schema, load_job

JOB = """\
name: digits
system: {name: biggan, preset: tiny}
data:
  path: datasets/digits
training:
  total_kimg: 1
  batch_size: 32
  slice_size: 16
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_job(path, overrides)
    return str(caught.value)


def test_a_short_job_is_completed_by_defaults(job_file: Path) -> None:
    job = load_job(job_file)
    assert job.training.batch_size == 32
    assert job.slices == 2
    assert job.resources.workers == 1


def test_a_dumped_job_is_whole_and_reads_back(job_file: Path, tmp_path: Path) -> None:
    job = load_job(job_file, ["training.optimizers.generator={lr: 1e-4, betas: [0, 0.9]}", "evaluation.metrics=[fid]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_job(job))
    assert load_job(again) == job
    assert yaml.safe_load(dump_job(job))["checkpoint"] == job.checkpoint.model_dump()


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("training.total_kimg=2.5", "training", "total_kimg", 2.5),
        ("training.total_kimg=1e-1", "training", "total_kimg", 0.1),
        ("data.mirror=true", "data", "mirror", True),
        ("data.path=a=b", "data", "path", "a=b"),
        ("ema.rampup=null", "ema", "rampup", None),
        ("evaluation.metrics=[kid_efflite0, fid]", "evaluation", "metrics", ("kid_efflite0", "fid")),
        ("system.config={attention: 16}", "system", "config", {"attention": 16}),
        ("system.config.eps=1e-5", "system", "config", {"eps": 1e-5}),
    ],
)
def test_overrides_are_typed_as_yaml(job_file: Path, override: str, section: str, field: str, value: Any) -> None:
    assert getattr(getattr(load_job(job_file, [override]), section), field) == value


def test_the_last_override_wins(job_file: Path) -> None:
    assert load_job(job_file, ["seed=1", "seed=2"]).seed == 2


@given(st.floats(min_value=1e-12, max_value=1e12, allow_nan=False))
def test_numbers_survive_a_dump(value: float) -> None:
    fields = yaml.safe_load(JOB) | {"ema": {"half_life_kimg": value}}
    job = JobSpec.model_validate(fields)
    # PyYAML writes 1e-05 as 1.0e-05, so the plain loader must agree with ours.
    assert yaml.safe_load(dump_job(job))["ema"]["half_life_kimg"] == value


def test_a_misspelt_field_is_refused_with_a_suggestion(job_file: Path) -> None:
    job_file.write_text(JOB.replace("batch_size", "batchsize"))
    lines = message(job_file).splitlines()
    assert len(lines) == 2  # the misspelt field, and the required one that is missing
    unknown = next(line for line in lines if "unknown field" in line)
    assert unknown.startswith(f"{job_file}:7: training.batchsize: unknown field. Did you mean 'batch_size'?")
    assert "Fields of training: batch_size, batch_statistics," in unknown
    assert any(line.startswith(f"{job_file}:5: training.batch_size: is required and missing") for line in lines)


def test_a_field_in_the_wrong_section_is_sent_to_its_own(job_file: Path) -> None:
    job_file.write_text(JOB + "workers: 2\n")
    assert f"{job_file}:9: workers: unknown field. It belongs in section 'resources'." in message(job_file)


def test_a_misspelt_field_of_an_optimizer_names_its_fields(job_file: Path) -> None:
    text = message(job_file, "training.optimizers.generator.beta=[0, 0.9]")
    fields = "betas, eps, lr, momentum, name, trust, weight_decay"
    assert f"Did you mean 'betas'? Fields of training.optimizers.generator: {fields}." in text


def test_all_problems_are_reported_at_once_each_with_its_place(job_file: Path) -> None:
    job_file.write_text(JOB.replace("total_kimg: 1", "total_kimg: -1").replace("digits\nsystem", "a b\nsystem"))
    lines = message(job_file, "data.threads=many").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{job_file}:1", "name"],
        ["--set data.threads=many", "data.threads"],
        [f"{job_file}:6", "training.total_kimg"],
    ]
    assert "-1 is not allowed: it must be greater than 0. Length of the run in thousands of real images." in lines[2]


def test_rules_across_fields_point_at_the_field(job_file: Path) -> None:
    lines = message(job_file, "training.slice_size=12", "evaluation.metrics=[kid]").splitlines()
    assert lines[0].startswith(f"{job_file}:7: training.batch_size: 32 is not a multiple")
    assert lines[1].startswith("--set evaluation.metrics=[kid]: evaluation.metrics: 'kid'")


def test_an_empty_section_is_refused(job_file: Path) -> None:
    job_file.write_text(JOB + "ema:\n")
    assert "ema: an empty value is not allowed: it must be a section with fields below it." in message(job_file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (JOB + "seed: 1\nseed: 2\n", ":10: not valid YAML: seed appears twice (first in line 9); keep one of them."),
        (JOB.replace("data:\n", "data:\n  path: a\n"), ":5: not valid YAML: path appears twice"),
        ("name: [1\n", ":2: not valid YAML: "),
        ("", ": holds nothing, but a job is a mapping of fields"),
        ("- a\n", ": holds a list, but a job is a mapping of fields"),
        ("!!python/object/apply:os.getcwd []\n", ":1: not valid YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_job_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message(path).startswith(f"{path}{expected}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no such job file" in message(tmp_path / "none.yaml")
    assert "is a directory" in message(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8" in message(binary)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.total_kimg", "expected field.path=value"),
        ("=3", "expected field.path=value"),
        ("training..x=3", "expected field.path=value"),
        ("data.path.x=3", "data.path is a str and has no fields"),
        ("seed=[1", "is not a YAML value"),
    ],
)
def test_malformed_overrides_are_refused(job_file: Path, override: str, expected: str) -> None:
    text = message(job_file, override)
    assert text.startswith(f"--set {override}: ")
    assert expected in text


def test_schema_documents_every_field() -> None:
    schema = job_schema()
    json.dumps(schema)
    for name, section in {**schema["$defs"], "JobSpec": schema}.items():
        assert section["additionalProperties"] is False
        for field, facts in section["properties"].items():
            assert "description" in facts or "$ref" in facts, f"{name}.{field} has no description"
