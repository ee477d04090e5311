"""What the documentation names exists: files, commands and their options."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from bessemer.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster").rglob("README.md")),
    ROOT / "benchmarks/README.md",
]
COMMAND = re.compile(r"(?:^|`|\s)(?:\.venv/bin/)?bessemer ((?:[a-z-]+)(?: [^`\n|#]*)?)", re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Every `bessemer ...` of the page's plain code blocks and code spans, without the word itself."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    blocks = [text for language, text in fence.findall(page) if not language]
    spans = [f"`{span}`" for span in re.findall(r"`([^`\n]+)`", fence.sub("", page))]
    return [shlex.split(found) for found in COMMAND.findall("\n".join(blocks + spans))]


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` call, and the words that are left for it."""
    command: Any = get_command(app)
    while words and words[0].strip("[") in getattr(command, "commands", {}):
        command, words = command.commands[words[0].strip("[")], words[1:]
    return command, words


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        command, rest = resolve(words)
        assert command.name != "bessemer", f"{path}: there is no command `bessemer {' '.join(words)}`"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        used = {word.strip("[]").partition("=")[0] for word in rest if word.strip("[]").startswith("-")}
        assert used <= known, f"{path}: bessemer {' '.join(words)}"


def test_the_readme_lists_every_command() -> None:
    group: Any = get_command(app)
    listed = {words[0] for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert listed >= set(group.commands)


@pytest.mark.parametrize("target", ["quickstart", "test", "install", "lint", "help", "clean"])
def test_the_makefile_has_the_targets_of_the_documentation(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
