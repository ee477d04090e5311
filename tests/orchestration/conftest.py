"""What several tests of searches begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from bessemer.tracking.search_journal import SearchJournal


@pytest.fixture
def journal(tmp_path: Path) -> SearchJournal:
    """The journal of a search that has just begun."""
    found = SearchJournal(tmp_path)
    found.write("session", number=1)
    return found
