"""What a run keeps of the code and the packages that it was started with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bessemer.errors import RunError
from bessemer.orchestration import provenance
from bessemer.orchestration.provenance import Provenance


def git(*arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *name, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "repository"
    (root / "below").mkdir(parents=True)
    monkeypatch.chdir(root)
    git("init", "-q")
    (root / "kept.py").write_text("a = 1\n")
    (root / ".gitignore").write_text("ignored.py\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return root


def test_a_clean_repository_is_its_commit(repository: Path) -> None:
    found = Provenance.here()
    assert found.record["git_sha"] == git("rev-parse", "HEAD").strip()
    assert found.record["git_dirty"] is False
    assert found.diff == b""


def test_changes_and_new_code_make_the_tree_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "kept.py").write_text("a = 2\n")
    (repository / "below" / "new file.py").write_text("b = 3\n")
    (repository / "ignored.py").write_text("secret = 1\n")
    (repository / "notes.txt").write_text("not code\n")
    before = git("status", "--porcelain")
    monkeypatch.chdir(repository / "below")  # wherever in the repository it is started
    found = Provenance.here()
    assert found.record["git_diff"] == {"bytes": len(found.diff), "whole": True}
    assert git("status", "--porcelain") == before, "the person's index must stay as it was"

    copy = tmp_path / "copy"
    git("clone", "-q", str(repository), str(copy))
    monkeypatch.chdir(copy)
    (tmp_path / "changes.diff").write_bytes(found.diff)
    git("apply", str(tmp_path / "changes.diff"))
    assert (copy / "kept.py").read_text() == "a = 2\n"
    assert (copy / "below" / "new file.py").read_text() == "b = 3\n"
    assert not (copy / "ignored.py").exists()
    assert not (copy / "notes.txt").exists()


def test_the_diff_is_bounded(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MOST_DIFF_BYTES", 100)
    (repository / "kept.py").write_text("a = 2\n" * 100_000)
    found = Provenance.here()
    assert len(found.diff) == 100
    assert found.record["git_diff"] == {"bytes": 100, "whole": False}


def test_outside_a_repository_there_are_only_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = Provenance.here()
    assert "git_sha" not in found.record
    assert f"torch=={found.record['packages']['torch']}" in found.lock.splitlines()


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = Provenance.here()
    found.write(tmp_path)
    assert Provenance.read(tmp_path) == found
    assert found.differences_here() == {}
    (tmp_path / "lock.txt").unlink()
    with pytest.raises(RunError, match=r"holds not what `bessemer submit` sends: .*lock\.txt"):
        Provenance.read(tmp_path)


def test_other_versions_are_named() -> None:
    here = Provenance.here()
    packages = {**here.record["packages"], "torch": "1.0"}
    other = Provenance({**here.record, "packages": packages}, b"", "")
    assert other.differences_here() == {"torch": (here.record["packages"]["torch"], "1.0")}
