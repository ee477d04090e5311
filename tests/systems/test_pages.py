"""docs/systems/ is what the script writes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from bessemer.systems.registry import all_systems

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "systems"
RENEW = "renew it with: .venv/bin/python scripts/document_systems.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "document_systems.py"))


@pytest.mark.parametrize("name", list(all_systems()))
def test_the_page_of_a_system_is_up_to_date(script: dict[str, Any], name: str) -> None:
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == script["page"](name), RENEW


def test_the_list_is_up_to_date_and_there_are_no_other_pages(script: dict[str, Any]) -> None:
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == script["index"](), RENEW
    assert {path.stem for path in FOLDER.glob("*.md")} == {"README", *all_systems()}
