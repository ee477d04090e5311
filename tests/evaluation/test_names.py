import subprocess
import sys

import pytest

from bessemer.errors import EvaluationError
from bessemer.evaluation.names import EXTRACTORS, METRICS, parse_metric


def test_known_names_say_kind_and_extractor() -> None:
    assert parse_metric("fid") == ("fd", "inception")
    assert parse_metric("fd_efflite0") == ("fd", "efflite0")
    assert parse_metric("kid_inception") == ("kid", "inception")
    assert parse_metric("precision_inception-pytorch-768") == ("precision", "inception-pytorch-768")
    assert parse_metric("memorised_pixels") == ("memorised", "pixels")


def test_distances_are_better_low_and_shares_high() -> None:
    higher = {metric.kind for metric in METRICS.values() if metric.higher_is_better}
    assert higher == {"precision", "recall", "density", "coverage", "is", "cas", "cas-resnet"}


def test_the_inception_score_needs_a_classifier() -> None:
    assert {m.extractor for m in METRICS.values() if m.kind == "is"} == {
        "efflite0",
        "inception",
        "inception-tensorflow",
    }


def test_lpips_is_a_distance_of_pairs_and_the_resnet_sees_colours() -> None:
    assert {m.kind[:4] for m in METRICS.values() if m.extractor == "lpips"} == {"ppl-"}
    assert [name for name, m in METRICS.items() if m.kind == "cas-resnet"] == ["cas-resnet_pixels"]
    assert parse_metric("ppl-wend-face_lpips") == ("ppl-wend-face", "lpips")
    assert parse_metric("ppl-zfull_inception-pytorch-768").is_path


def test_only_fid_hides_its_extractor() -> None:
    for name, metric in METRICS.items():
        assert metric.extractor in EXTRACTORS
        assert name == "fid" or name.endswith(f"_{metric.extractor}")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("kid_eflite0", "kid_efflite0"),
        ("FID", "fid"),
        ("fid50k_full", "fid"),
        ("fid_efflite0", "fd_efflite0"),
        ("fid_inception", "fid"),
        ("kid", "kid_efflite0"),
        ("KID-Inception", "kid_inception"),
        ("coverage", "coverage_efflite0"),
        ("inception_score", "is_inception"),
        ("precision_efflite", "precision_efflite0"),
        ("ppl2_wend", "ppl-wend_lpips"),
        ("cas_resnet", "cas-resnet_pixels"),
    ],
)
def test_unknown_name_suggests_the_one_meant(written: str, meant: str) -> None:
    with pytest.raises(EvaluationError, match=f"metric '{written}'.*Did you mean '{meant}'"):
        parse_metric(written)


def test_nonsense_lists_what_is_known() -> None:
    with pytest.raises(EvaluationError, match=r"Kinds: kid, fd, .*Extractors: efflite0, inception") as error:
        parse_metric("zzz")
    assert "Did you mean" not in str(error.value)


def test_names_import_no_torch() -> None:
    code = "import sys, bessemer.evaluation.names; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
