import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.main import get_command

from bessemer import __version__
from bessemer.cli.app import app, run
from bessemer.errors import DataError

HEAVY = (
    "torch",
    "ray",
    "deepspeed",
    "mlflow",
    "webdataset",
    "matplotlib",
    "scipy",
    "sklearn",
    "numpy",
)  # typer itself needs pydantic
GROUP = get_command(app)
VERBS = [
    "board",
    "checkpoint",
    "compare",
    "compare-sets",
    "data",
    "doctor",
    "ema",
    "evaluate",
    "extractors",
    "jobs",
    "leaderboard",
    "logs",
    "mlflow",
    "plan",
    "project",
    "quickstart",
    "register",
    "report",
    "resume",
    "runs",
    "sample",
    "schema",
    "search",
    "status",
    "stop",
    "submit",
    "systems",
    "train",
]
HELP = [
    [],
    *([verb] for verb in VERBS),
    ["checkpoint", "export"],
    ["data", "index"],
    ["data", "info"],
    ["data", "pack"],
    ["data", "verify"],
    ["ema", "reconstruct"],
    ["extractors", "get"],
    ["extractors", "list"],
    ["search", "run"],
    ["search", "status"],
    ["systems", "list"],
    ["systems", "show"],
]


def test_all_verbs_are_there_and_explain_themselves() -> None:
    commands = GROUP.commands  # type: ignore[attr-defined]
    assert sorted(commands) == VERBS
    for name, command in commands.items():
        assert len(command.get_short_help_str(200).split()) >= 3, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"bessemer {name}: {parameter.name} has no help"


@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(["bessemer", *words]))
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, json\n"
        "from bessemer.cli import main\n"
        f"sys.argv = ['bessemer', *{words!r}, '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as e:\n"
        f"    print(json.dumps([e.code, sorted(set({HEAVY!r}) & set(sys.modules))]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Usage: bessemer" in out
    assert json.loads(out.splitlines()[-1]) == [0, []]


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bessemer", "--version"])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"bessemer {__version__}\n"


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], object]:
    """Run the command line with a verb that raises; returns the exit code."""
    callbacks = {command.callback.__name__: command for command in app.registered_commands if command.callback}

    def run_raising(error: BaseException) -> object:
        def schema() -> None:
            raise error

        monkeypatch.setattr(callbacks["schema"], "callback", schema)
        monkeypatch.setattr(sys, "argv", ["bessemer", "schema"])
        with pytest.raises(SystemExit) as ended:
            run()
        return ended.value.code

    return run_raising


def test_errors_that_a_person_can_fix_have_no_traceback(
    run_with: Callable[[BaseException], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(DataError("cats/1.jpg: is text; remove it.")) == 2
    assert capsys.readouterr().err == "error: cats/1.jpg: is text; remove it.\n"


def test_a_long_error_fits_one_screen(
    run_with: Callable[[BaseException], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(DataError("\n".join(map(str, range(100))))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30
    assert lines[-1] == "... and 71 more lines"


def test_interrupt_ends_with_130(run_with: Callable[[BaseException], object]) -> None:
    assert run_with(KeyboardInterrupt()) == 130


def test_defects_keep_their_traceback(run_with: Callable[[BaseException], object]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(ZeroDivisionError())
