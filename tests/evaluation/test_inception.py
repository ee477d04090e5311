import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bessemer.errors import EvaluationError
from bessemer.evaluation.cleanfid_import import import_cleanfid
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.weights import WEIGHTS, find_weights
from bessemer.files import file_sha256


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
    assert find_weights("inception") == kept
    for said in (standin_file, standin_file.parent):
        monkeypatch.setenv("BESSEMER_INCEPTION", str(said))
        assert find_weights("inception") == standin_file


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
            find_weights("inception")


def test_other_weights_are_never_loaded(standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / standin.name
    torn.write_bytes(standin.read_bytes()[:-1000])
    monkeypatch.setenv("BESSEMER_INCEPTION", str(torn))
    with pytest.raises(
        EvaluationError, match=f"{torn} has sha256 .* but the metric is defined by {WEIGHTS['inception'].sha256}"
    ):
        get_extractor("inception")


def test_tensorflows_numbers_are_those_of_the_whole_graph(standin: Path) -> None:
    from cleanfid.inception_torchscript import InceptionV3W

    images = torch.randint(0, 256, (20, 3, 24, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = get_extractor("inception-tensorflow").features(images)
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="torch.jit"):
        expected = InceptionV3W(str(standin.parent), download=False, resize_inside=True)(images.float())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - get_extractor("inception").features(images)).abs().max() > 0.01


@pytest.fixture
def pytorch_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in the file that pytorch-fid publishes, accepted as if they were its own."""
    inception = import_cleanfid("inception_pytorch")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision
        network = inception.fid_inception_v3()
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(1)
        elif name.endswith(("running_mean", "bias", "num_batches_tracked")):
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.2)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    path = tmp_path / WEIGHTS["inception-pytorch"].files[0]
    torch.save(network.state_dict(), path)
    monkeypatch.setenv("BESSEMER_INCEPTION_PYTORCH", str(path))
    monkeypatch.setitem(
        WEIGHTS, "inception-pytorch", replace(WEIGHTS["inception-pytorch"], sha256=file_sha256(path)[:8])
    )
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning", "ignore:Arguments other than:UserWarning")
def test_pytorchs_numbers_are_those_of_clean_fids_network(
    pytorch_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blocks = import_cleanfid("inception_pytorch")
    state = torch.load(pytorch_weights, weights_only=True)
    monkeypatch.setattr(blocks, "load_state_dict_from_url", lambda *a, **k: state)
    network = blocks.InceptionV3(output_blocks=[2, 3], resize_input=False).eval()
    resize = import_cleanfid("resize").build_resizer("legacy_pytorch")
    resized = [torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in images]
    with torch.no_grad():
        maps, last = network(torch.stack(resized) / 255)
    found = get_extractor("inception-pytorch").features(images)
    assert last.std() > 1e-3
    torch.testing.assert_close(found, last[:, :, 0, 0], rtol=1e-3, atol=1e-4)
    tap = get_extractor("inception-pytorch-768")
    assert tap.name == "inception-pytorch-768"
    torch.testing.assert_close(tap.features(images), maps.mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert get_extractor("inception-pytorch-1280").features(images).shape == (2, 1280)


def test_pytorchs_numbers_need_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setenv("BESSEMER_INCEPTION_PYTORCH", str(tmp_path / "other.pth"))
    with pytest.raises(EvaluationError, match="but the metric is defined by 6726825d"):
        get_extractor("inception-pytorch")
