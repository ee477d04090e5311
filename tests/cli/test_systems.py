import json
import re

import pytest
from typer.testing import CliRunner

from bessemer.cli.app import app
from bessemer.errors import SpecError


def _run(*words: str) -> str:
    result = CliRunner().invoke(app, ["systems", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_lists_every_system_with_and_without_the_word() -> None:
    assert re.search(r"^biggan +adversarial +images +arXiv:1809.11096 +samples +tiny32, cifar10", _run(), re.MULTILINE)
    assert _run("list") == _run()
    listed = json.loads(_run("--json"))
    assert json.loads(_run("list", "--json")) == listed
    by_name = {s["name"]: s for s in listed}
    assert {"biggan", "biggan-deep"} <= set(by_name)
    assert "bits_per_dim" in by_name["rbm"]["metrics"]
    assert "bits_per_dim" not in by_name["biggan"]["metrics"]
    assert by_name["rbm"]["modality"] == "binary images"
    assert re.search(r"^rbm +energy +binary images +doi:\S+ +bits_per_dim +tiny8", _run(), re.MULTILINE)


def test_show_names_the_stages_and_the_updates_of_all_of_them() -> None:
    facts = json.loads(_run("show", "dbn", "--json"))
    assert [s["kimg"] for s in facts["stages"]] == [200.0, None]
    assert [u["network"] for u in facts["updates"]] == ["rbm1", "rbm2"]
    assert "to the end" in _run("show", "dbn")
    assert "STAGE" not in _run("show", "biggan")


def test_show_as_json_has_the_numbers_of_the_preset() -> None:
    facts = json.loads(_run("show", "biggan", "--preset", "imagenet128", "--json"))
    assert facts["networks"]["generator"]["parameters"] == 70_433_988
    assert facts["networks"]["discriminator"]["parameters"] == 87_982_370
    assert facts["config"]["latent_dim"] == 120
    assert [u["name"] for u in facts["updates"]] == ["discriminator", "generator"]
    assert facts["optimizers"]["discriminator"]["lr"] == 4e-4
    assert facts["sampled_networks"] == ["generator"]
    assert "kid_efflite0" in facts["metrics"]
    assert "arXiv:1809.11096" in facts["paper"]


def test_show_for_people_takes_the_first_preset() -> None:
    out = _run("show", "biggan")
    assert "biggan (adversarial), preset tiny32" in out
    assert "302,788" in out
    assert "285,893" in out
    assert "adam lr 0.0002 betas 0, 0.999 eps 1e-08" in out
    assert "Metrics: fid, or KIND_EXTRACTOR with a kind of kid, " in out
    assert "Metrics: bits_per_dim, fid, or " in _run("show", "rbm")


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match="Did you mean 'biggan'"):
        _run("show", "bigga")
    with pytest.raises(SpecError, match="Did you mean 'cifar10'"):
        _run("show", "biggan", "--preset", "cifar1")
