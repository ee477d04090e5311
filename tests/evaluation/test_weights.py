import multiprocessing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from bessemer.errors import EvaluationError
from bessemer.evaluation import weights
from bessemer.evaluation.weights import WEIGHTS, fetch, find_weights

CONTENT = b"weights" * 1000


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file at an address that answers, with the hash that is expected of Inception's."""
    path = tmp_path / "published.pt"
    path.write_bytes(CONTENT)
    own = replace(WEIGHTS["inception"], sha256=sha256(CONTENT).hexdigest(), source=path.as_uri())
    monkeypatch.setitem(WEIGHTS, "inception", own)
    return path


def test_weights_are_fetched_whole_and_found(published: Path) -> None:
    place = fetch("inception")
    assert place == find_weights("inception")
    assert place.read_bytes() == CONTENT
    published.unlink()
    assert fetch("inception") == place  # it is there: nothing is downloaded


def test_another_file_never_gets_there(published: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(CONTENT[:-1])
    with pytest.raises(EvaluationError, match=r"has sha256 \w+, but the metric is defined by"):
        fetch("inception", other.as_uri())
    directory = WEIGHTS["inception"].directory
    assert [path.name for path in directory.iterdir()] == [".inception-2015-12-05.pt.lock"]
    damaged = directory / "inception-2015-12-05.pt"
    damaged.write_bytes(CONTENT[:100])  # as an interrupted copy leaves it
    assert fetch("inception").read_bytes() == CONTENT


def test_an_address_that_does_not_answer_is_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nowhere cannot be fetched"):
        fetch("inception", (tmp_path / "nowhere").as_uri())
    with pytest.raises(EvaluationError, match="is no address"):
        fetch("inception", str(published))


def test_what_has_no_single_file_says_where_to_choose_one() -> None:
    with pytest.raises(
        EvaluationError, match=r"fetched are inception, inception-pytorch, vgg16, lpips\. Choose a file from .*dinov2"
    ):
        fetch("dinov2")
    with pytest.raises(EvaluationError, match="fetched are inception, inception-pytorch"):
        fetch("nothing")


@pytest.mark.multiprocess
def test_processes_that_ask_at_once_download_once(published: Path, tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Barrier(3)
    log = tmp_path / "log"

    def ask() -> None:
        plain = weights.urllib.request.urlopen

        def counted(*arguments, **options):
            with log.open("a") as file:
                file.write("download\n")
            return plain(*arguments, **options)

        weights.urllib.request.urlopen = counted
        start.wait(30)
        fetch("inception")

    group = [multiprocessing.get_context("fork").Process(target=ask) for _ in range(3)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0, 0]
    assert log.read_text() == "download\n"
    assert find_weights("inception").read_bytes() == CONTENT
