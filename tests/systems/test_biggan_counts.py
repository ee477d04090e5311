"""Parameter counts of BigGAN and its kin against other code and against arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from bessemer.systems.adversarial.biggan import BigGAN
from bessemer.systems.registry import build, get

# Parameters of G and D, from instantiating BigGAN-PyTorch; 128 and the TF Hub and 512 rows also from compare_gan, those
# of SNGAN and SAGAN at 32 px from mimicry.
COUNTS = {
    ("biggan", "tiny32"): (302_788, 285_893),
    ("biggan", "cifar10"): (4_304_387, 4_207_361),
    ("biggan", "cifar100"): (4_580_867, 4_230_401),
    ("biggan", "res32"): (4_373_251, 4_207_361),
    ("biggan", "imagenet64"): (31_969_540, 20_571_842),
    ("biggan", "imagenet128"): (70_433_988, 87_982_370),
    ("biggan", "imagenet128-ch64"): (31_978_628, 39_448_258),
    ("biggan", "imagenet256"): (82_235_844, 99_225_890),
    ("biggan", "imagenet256-tfhub"): (82_097_604, 98_635_298),
    ("biggan", "imagenet512"): (82_468_068, 98_801_378),
    ("biggan", "imagenet512-tfhub"): (82_296_804, 98_801_378),
    ("biggan-deep", "deep32"): (3_079_299, 651_649),
    ("biggan-deep", "deep128"): (50_244_484, 34_590_210),
    ("biggan-deep", "deep256"): (55_736_708, 38_247_426),
    ("sngan", "cifar10"): (4_276_739, 1_053_825),
    ("sngan", "cifar10-projection"): (4_304_387, 1_055_105),
    ("sngan", "imagenet128"): (41_996_931, 30_005_013),
    ("sagan", "cifar10"): (4_386_308, 1_075_586),
    ("sagan", "imagenet128-attn64"): (42_017_412, 39_448_258),
}
COUNTED_BELOW = {("biggan-deep", "deep64"), ("biggan-deep", "deep512"), ("sagan", "imagenet128")}
KIN = ("biggan", "biggan-deep", "sngan", "sagan")


def _counts(name: str, preset: str, **fields: object) -> tuple[int, ...]:
    with torch.device("meta"):
        networks = build(name, preset, fields).networks()
    assert list(networks) == ["generator", "discriminator"]
    assert all(p.ndim > 0 for m in networks.values() for p in m.parameters())
    return tuple(sum(p.numel() for p in m.parameters()) for m in networks.values())


@pytest.mark.parametrize("which", COUNTS, ids=" ".join)
def test_parameter_counts(which: tuple[str, str]) -> None:
    assert _counts(*which) == COUNTS[which]


def test_every_preset_is_counted() -> None:
    assert set(COUNTS) | COUNTED_BELOW == {(name, preset) for name in KIN for preset in get(name).presets}


def test_the_two_references_of_the_256_discriminator_differ_by_one_shortcut() -> None:
    found = {
        (attention, shortcut): _counts(
            "biggan", "imagenet256", discriminator_attention=(attention,), shortcut=shortcut
        )[1]
        for attention, shortcut in ((64, "resampled"), (128, "resampled"), (128, "widened"), (64, "widened"))
    }
    assert found[64, "resampled"] == 99_225_890
    assert found[128, "resampled"] == 99_191_330
    assert found[64, "resampled"] - found[64, "widened"] == 768 * 768 + 768 == 590_592


def test_table_1_adds_up() -> None:
    """Millions of parameters of both networks in the paper's table 1, to the rounding of its authors."""
    plain = {"shared_dim": 0, "hierarchical": False, "latent_dim": 128}
    for expected, fields in (
        (81.5, {**plain, "generator_width": 64, "discriminator_width": 64}),
        (173.5, plain),
        (160.6, {**plain, "shared_dim": 128}),
        (158.3, {}),
    ):
        assert sum(_counts("biggan", "imagenet128", **fields)) / 1e6 == pytest.approx(expected, abs=0.2)


def _attention(channels: int) -> int:
    return 2 * channels * (channels // 8) + 2 * channels * (channels // 2) + 1


def test_attention_at_32_pixels_is_on_wider_maps_than_at_64() -> None:
    generator, discriminator = COUNTS["sagan", "imagenet128-attn64"]
    assert _counts("sagan", "imagenet128") == (
        generator + _attention(256) - _attention(128),
        discriminator + _attention(128) - _attention(64),
    )


def _conv(before: int, after: int, size: int) -> int:
    return before * after * size**2 + after


def _deep_generator(ch: int, widths: list[int], attention: int, classes: int) -> int:
    """Tables 7a to 9a, layer by layer: z and the class embedding have 128 dimensions each."""
    condition, widths = 256, [ch * w for w in widths]
    total = classes * 128 + (condition + 1) * 16 * widths[0]
    for before, after in pairwise(widths):
        for out in (before, after):
            hidden = before // 4
            norms = 2 * condition * (before + 3 * hidden)  # a gain and a bias for each channel
            total += norms + _conv(before, hidden, 1) + 2 * _conv(hidden, hidden, 3) + _conv(hidden, out, 1)
    return total + _attention(attention * ch) + 2 * widths[-1] + _conv(widths[-1], 3, 3)


def _deep_discriminator(ch: int, widths: list[int], attention: int, classes: int) -> int:
    """Tables 7b to 9b."""
    widths = [ch * w for w in widths]
    total = _conv(3, widths[0], 3)
    for before, after in pairwise(widths):
        hidden = after // 4
        total += _conv(before, hidden, 1) + _conv(after, hidden, 1)
        total += 2 * (2 * _conv(hidden, hidden, 3) + _conv(hidden, after, 1))
        total += _conv(before, after - before, 1) if after > before else 0
    return total + _attention(attention * ch) + widths[-1] + 1 + classes * widths[-1]


@pytest.mark.parametrize(
    ("preset", "ch", "generator", "discriminator", "attention"),
    [
        ("deep64", 64, [16, 16, 8, 4, 2], [1, 2, 4, 8, 16], (4, 2)),
        ("deep128", 128, [16, 16, 8, 4, 2, 1], [1, 2, 4, 8, 16, 16], (2, 2)),
        ("deep256", 128, [16, 16, 8, 8, 4, 2, 1], [1, 2, 4, 8, 8, 16, 16], (4, 4)),
        ("deep512", 128, [16, 16, 8, 8, 4, 2, 1, 1], [1, 1, 2, 4, 8, 8, 16, 16], (4, 4)),
    ],
)
def test_deep_networks_by_arithmetic(
    preset: str, ch: int, generator: list[int], discriminator: list[int], attention: tuple[int, int]
) -> None:
    assert _counts("biggan-deep", preset) == (
        _deep_generator(ch, generator, attention[0], 1000),
        _deep_discriminator(ch, discriminator, attention[1], 1000),
    )


@pytest.mark.parametrize(
    "which",
    [("biggan", "imagenet64"), ("biggan", "imagenet512"), ("biggan-deep", "deep512"), ("sngan", "imagenet128")],
    ids=" ".join,
)
def test_shapes_on_the_meta_device(which: tuple[str, str]) -> None:
    with torch.device("meta"):
        system = build(*which)
        assert isinstance(system, BigGAN)
        size, labels = system.config.resolution, torch.zeros(2, dtype=torch.long)
        images = system.generator(torch.randn(2, system.config.latent_dim), labels)
        assert images.shape == (2, 3, size, size)
        assert system.discriminator(images, labels).shape == (2,)
