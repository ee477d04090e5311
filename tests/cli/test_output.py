import json
from pathlib import Path

import pytest

from bessemer.cli.output import echo_json, human_bytes, progress, table, write_text
from bessemer.errors import MachineError


def test_table_aligns_words_left_and_numbers_right(capsys: pytest.CaptureFixture[str]) -> None:
    table(["run", "kimg", "kid"], [["a", 1.5, 0.123456], ["longer", 100, None]])
    assert capsys.readouterr().out.splitlines() == [
        "run     kimg     kid",
        "a        1.5  0.1235",
        "longer   100       -",
    ]


def test_table_without_rows_prints_its_headers(capsys: pytest.CaptureFixture[str]) -> None:
    table(["run", "kimg"], [])
    assert capsys.readouterr().out == "run  kimg\n"


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [["only one"]])


def test_json_is_strict_even_where_numbers_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"path": Path("runs/a"), "kid": float("nan"), "band": (1.0, float("inf")), "name": "é"})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {
        "path": "runs/a",
        "kid": None,
        "band": [1.0, None],
        "name": "é",
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 40, "5.0 TiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("packing") as advance:
        advance(1, None)
        advance(2, 2)
    assert capsys.readouterr() == ("", "")


def test_unwritable_file_names_path_and_fix(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"nowhere/a\.json: cannot be written .*--out"):
        write_text(tmp_path / "nowhere" / "a.json", "{}")
