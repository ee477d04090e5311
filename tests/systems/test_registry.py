import pytest
import torch

from bessemer.errors import SpecError
from bessemer.systems.contract import Batch, SystemConfig
from bessemer.systems.registry import all_systems, build, check_data, get, resolve_config


def test_finds_every_system_and_each_says_what_it_is() -> None:
    systems = all_systems()
    assert list(systems) == sorted(systems)
    assert {"biggan", "biggan-deep"} <= set(systems)
    for name, cls in systems.items():
        assert cls.name == name
        assert f".{cls.family}." in cls.__module__
        assert "arXiv:" in cls.paper or "doi:" in cls.paper
        assert cls.presets
        for preset in cls.presets:
            assert resolve_config(name, preset).classes >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bigga", "tiny32"), r"system\.name: .*'bigga'.*Did you mean 'biggan'\? Known: bigan, "),
        (("biggan", "tiny23"), r"system\.preset: .*'tiny23'.*Did you mean 'tiny32'\?"),
        (("biggan", "tiny32", {"orthogonl": 1}), r"system\.config\.orthogonl: .*Did you mean 'orthogonal'\?"),
        (("biggan", "tiny32", {"classes": 0}), r"system\.config\.classes: .*greater than or equal to 1.*value 0"),
        (("biggan", "tiny32", {"resolution": 48}), r"system\.config\.resolution: .*32, 64.*value 48"),
        (("biggan", "tiny32", {"latent_dim": 81}), r"latent_dim 81 must be a multiple of 4 .*hierarchical to false"),
        (("biggan", "tiny32", {"shared_dim": 0}), "hierarchical needs shared_dim > 0"),
        (("biggan", "tiny32", {"generator_attention": (12,)}), r"generator_attention \[12\].*\[8, 16, 32\]"),
        (("biggan-deep", "deep32", {"hierarchical": True}), r"system\.config\.hierarchical: .*BigGANDeepConfig"),
        (("biggan", "tiny32", None, {"resolution": 64}), r"resolution: .* 32, but the data set has 64.*--size 32"),
        (("biggan", "tiny32", {"classes": 3}, {"classes": 10}), r"classes: .*expects 3, but the data set has 10"),
    ],
)  # fmt: skip
def test_refusals_name_field_value_and_fix(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve_config(*arguments)  # type: ignore[arg-type]


def test_preset_then_data_then_job() -> None:
    config = resolve_config("biggan", "tiny32", {"bn_eps": 1e-3}, {"resolution": 32, "channels": 1, "classes": 7})
    assert config.model_dump()["bn_eps"] == 1e-3
    assert (config.channels, config.classes) == (1, 7)
    assert resolve_config("biggan", "tiny32").classes == 10


def test_build_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    system = build("biggan", "tiny32")
    assert isinstance(system, get("biggan"))
    assert torch.equal(torch.get_rng_state(), state)


def test_facts_that_a_configuration_has_no_field_for_are_left_out() -> None:
    assert resolve_config("biggan", "tiny32", {}, {"frames": 16, "samples": 16000}) == resolve_config(
        "biggan", "tiny32"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"images": [3, 32, 32], "targets": [3, 32, 32]},
            r"has images \[3, 32, 32\], targets .* takes images \[3, 32, 32\]",
        ),
        ({"clips": [16, 3, 32, 32]}, r"data\.path: sets/x has clips \[16, 3, 32, 32\], but biggan takes images"),
        ({"images": [3, 64, 64]}, r"has images \[3, 64, 64\].*pack the data in that shape"),
    ],
)
def test_a_data_set_must_have_what_a_system_takes(fields: dict[str, list[int]], message: str) -> None:
    with torch.device("meta"):
        system = build("biggan", "tiny32")
    check_data(system, {"images": [3, 32, 32]}, "sets/x")
    with pytest.raises(SpecError, match=message):
        check_data(system, fields, "sets/x")


def test_shapes_follow_from_what_a_system_takes_and_its_configuration() -> None:
    class Config(SystemConfig):
        resolution: int = 8
        target_channels: int = 1
        frames: int = 5
        samples: int = 100
        bits: int = 30

    system = build("biggan", "tiny32")
    system.config = Config()
    shapes = {"images": (3, 8, 8), "targets": (1, 8, 8), "others": (3, 8, 8), "clips": (5, 3, 8, 8)}
    for name, shape in {**shapes, "audio": (100,), "bits": (30,)}.items():
        system.takes = (name,)  # type: ignore[misc]
        assert dict(system.batch_shapes) == {name: shape}


def test_a_batch_holds_fields_by_name() -> None:
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.ones(2, dtype=torch.int64), targets=torch.ones(2, 1, 4, 4))
    moved = batch.to(torch.device("cpu"), torch.channels_last)
    assert (len(batch), batch.names, moved.names) == (2, ("images", "targets"), ("images", "targets"))
    assert moved["targets"].is_contiguous(memory_format=torch.channels_last)
    sound = Batch(None, batch.labels, audio=torch.zeros(2, 10)).to(torch.device("meta"), torch.channels_last)
    assert (sound["audio"].shape, sound.labels.device.type) == ((2, 10), "meta")
    with pytest.raises(KeyError, match="no field 'images'; it has audio"):
        _ = sound.images
