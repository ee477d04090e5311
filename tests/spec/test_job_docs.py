import runpy
from pathlib import Path

import pytest
import yaml

from bessemer.spec.load import job_schema, load_job
from bessemer.spec.search_load import check_corners, load_base, load_search

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_schema() -> None:
    with_fields = runpy.run_path(str(ROOT / "scripts" / "document_jobs.py"))["with_fields"]
    assert with_fields(PAGE) == PAGE, "renew them with: .venv/bin/python scripts/document_jobs.py"


def test_the_tables_of_searches_are_those_of_the_schema() -> None:
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    with_fields = runpy.run_path(str(ROOT / "scripts" / "document_jobs.py"))["with_fields"]
    assert with_fields(page, "search") == page, "renew them with: .venv/bin/python scripts/document_jobs.py"


def test_the_example_of_a_search_is_legal(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    file = tmp_path / "search.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "quickstart.yaml").write_text((ROOT / "jobs" / "quickstart.yaml").read_text())
    search = load_search(file)
    check_corners(search, load_base(search, tmp_path))


def test_every_field_is_documented() -> None:
    for section in [*job_schema()["$defs"].values(), job_schema()]:
        for field in section["properties"]:
            assert f"{field}`" in PAGE


def test_the_example_is_a_legal_job(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(PAGE.split("```yaml\n")[1].split("```")[0])
    assert load_job(job).slices == 2


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_file_is_legal(path: Path) -> None:
    job = load_job(path)
    assert yaml.safe_load(path.read_text())["name"] == job.name
