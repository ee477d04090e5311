import builtins
from pathlib import Path

import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation import inception
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.inception import find_weights


def test_features_are_those_of_clean_fids_wrapper(standin: Path) -> None:
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    images = torch.randint(0, 256, (4, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    extractor = get_extractor("inception")
    found = extractor.features(images)
    assert found.shape == (4, extractor.dimension)
    resize = build_resizer("clean")
    resized = [torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in images]
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="torch.jit"):
        expected = InceptionV3W(str(standin.parent), download=False)(torch.stack(resized))
    assert expected[:, :32].std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grey_is_repeated(standin: Path) -> None:
    grey = torch.randint(0, 256, (2, 1, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    extractor = get_extractor("inception")
    torch.testing.assert_close(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))


def test_weights_are_found_by_variable_then_in_the_cache(
    standin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "cache" / "weights" / standin_file.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    assert find_weights() == kept
    for said in (standin_file, standin_file.parent):
        monkeypatch.setenv("BESSEMER_INCEPTION", str(said))
        assert find_weights() == standin_file


@pytest.mark.skipif(Path("/tmp/inception-2015-12-05.pt").exists(), reason="clean-fid has put the weights there")
def test_missing_weights_say_where_they_belong_and_what_works_without(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as error:
        get_extractor("inception")
    for part in ("inception-2015-12-05.pt", str(tmp_path / "cache" / "weights"), "BESSEMER_INCEPTION", "kid_efflite0"):
        assert part in str(error.value)


def test_variable_that_names_nothing_is_an_error_although_the_cache_has_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "cache" / "weights" / "inception-2015-12-05.pt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for said in (tmp_path / "nowhere", tmp_path):
        monkeypatch.setenv("BESSEMER_INCEPTION", str(said))
        with pytest.raises(EvaluationError, match=f"BESSEMER_INCEPTION: {said}"):
            find_weights()


def test_other_weights_are_never_loaded(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / standin.name
    torn.write_bytes(standin.read_bytes()[:-1000])
    monkeypatch.setenv("BESSEMER_INCEPTION", str(torn))
    with pytest.raises(
        EvaluationError, match=f"{torn} has sha256 .* but `fid` is defined by {inception.INCEPTION_SHA256}"
    ):
        get_extractor("inception")


def test_missing_package_says_how_to_install_it(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / standin.name  # a path that no other test has loaded
    copy.write_bytes(standin.read_bytes())
    monkeypatch.setenv("BESSEMER_INCEPTION", str(copy))
    real_import = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.startswith("cleanfid"):
            raise ModuleNotFoundError("No module named 'cleanfid'", name="cleanfid")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EvaluationError, match=r"package cleanfid is missing.*bessemer\[evaluation\]"):
        get_extractor("inception")
