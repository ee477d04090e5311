"""ProGAN: growing on the image clock, fading, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.systems.tiny import random_batch

from bessemer.nn.resample import upsample
from bessemer.systems.adversarial.progan import Growth, ProGAN, pixel_norm, shrink
from bessemer.systems.contract import Clock
from bessemer.systems.registry import build


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> ProGAN:
    system = build("progan", "tiny16", {"latent_dim": 8, "channel_base": 64, "channel_max": 8, **fields})
    assert isinstance(system, ProGAN)
    system.init_weights(g())
    for i, p in enumerate(system.discriminator.parameters()):
        if p.ndim == 1:
            p.data.normal_(generator=g(i))
    return system


def test_sizes_of_the_papers_model() -> None:
    """Those that the authors' code prints for 1024 pixels."""
    with torch.device("meta"):
        system = build("progan", "celebahq1024")
    sizes = {k: sum(p.numel() for p in n.parameters()) for k, n in system.networks().items()}
    assert sizes == {"generator": 23_079_115, "discriminator": 23_087_249}


def test_schedule_of_the_paper() -> None:
    with torch.device("meta"):
        system = build("progan", "celebahq1024")
    assert isinstance(system, ProGAN)
    assert [s.kimg for s in system.stages()] == [800] * 17
    assert [s.name for s in system.stages()][-2:] == ["1024 pixels, fading in", "1024 pixels"]
    found = [system.growth(Clock(kimg * 1000, 0)) for kimg in (0, 799, 800, 1200, 1600, 2399, 2400, 12_000, 20_000)]
    assert [4 << f.level for f in found] == [4, 4, 8, 8, 8, 8, 16, 1024, 1024]
    assert [f.alpha for f in found] == [1, 1, 0, 0.5, 1, 1, 0, 0, 1]
    for kimg in range(0, 20_000, 100):
        renewed = system.renewed(*_around(kimg))
        # Levels at work: two while one fades in. The authors' code begins anew when they change.
        before, now = ({f.level, f.level - (f.alpha < 1)} for f in map(system.growth, _around(kimg)))
        assert renewed == (("generator", "discriminator") if before != now else ())


def _around(kimg: int) -> list[Clock]:
    return [Clock(max(0, kimg * 1000 - 16), 1), Clock(kimg * 1000, 2)]


def test_presets_are_the_authors_configurations() -> None:
    """Of the code that made the paper's results, and of the later one."""
    expected = {
        "celebahq1024": (800, 800, 16, 1.0, 512),
        "celebahq1024-fast": (600, 600, 4, 1.0, 512),
        "lsun256": (800, 800, 16, 1.0, 512),
        "cifar10": (400, 400, 16, 750.0, 128),
    }
    with torch.device("meta"):
        for preset, numbers in expected.items():
            system = build("progan", preset)
            assert isinstance(system, ProGAN)
            c = system.config
            assert (c.fade_kimg, c.stable_kimg, c.minibatch_group, c.target, c.latent_dim) == numbers
            assert (c.penalty, c.drift, c.lr) == (10.0, 1e-3, 1e-3)
            adam = system.optimizers()["generator"]
            assert (adam.name, adam.lr, adam.betas, adam.eps) == ("adam", 1e-3, (0.0, 0.99), 1e-8)
        assert [system.config.width(level) for level in range(4)] == [128] * 4


@pytest.mark.parametrize("level", [1, 2])
@torch.no_grad()
def test_a_new_level_begins_as_the_old_one_enlarged(level: int) -> None:
    system, z = small(), torch.randn(4, 8, generator=g(1))
    old, start = system.generator(z, Growth(level - 1, 1.0)), system.generator(z, Growth(level, 0.0))
    torch.testing.assert_close(start, upsample(old))
    x = torch.randn(4, 1, 4 << level, 4 << level, generator=g(2))
    scores = system.discriminator(x, Growth(level, 0.0))
    torch.testing.assert_close(scores, system.discriminator(F.avg_pool2d(x, 2), Growth(level - 1, 1.0)))
    half = system.generator(z, Growth(level, 0.5))
    torch.testing.assert_close(half, (start + system.generator(z, Growth(level, 1.0))) / 2)


def test_real_images_fade_like_generated_ones() -> None:
    x = torch.randn(2, 1, 16, 16, generator=g())
    assert torch.equal(shrink(x, Growth(2, 1.0)), x)
    torch.testing.assert_close(shrink(x, Growth(2, 0.0)), upsample(F.avg_pool2d(x, 2)))
    torch.testing.assert_close(shrink(x, Growth(2, 0.3)), 0.7 * upsample(F.avg_pool2d(x, 2)) + 0.3 * x)
    torch.testing.assert_close(shrink(x, Growth(0, 1.0)), F.avg_pool2d(x, 4))


def test_samples_grow_and_keep_their_size() -> None:
    system = small(fade_kimg=1.0, stable_kimg=1.0)
    labels = torch.zeros(2, dtype=torch.int64)
    for kimg, blocks in ((0.5, 4), (2.9, 2), (9.0, 1)):
        system.after_iteration(Clock(round(kimg * 1000), 3))
        images = system.sample(labels, g())
        assert images.shape == (2, 1, 16, 16)
        corners = images[:, :, ::blocks, ::blocks].repeat_interleave(blocks, 2).repeat_interleave(blocks, 3)
        assert torch.equal(images, corners)
    assert not torch.equal(images, upsample(images[:, :, ::2, ::2]))


def test_pixel_norm_and_loss_by_hand() -> None:
    x = torch.randn(3, 5, 2, 2, generator=g())
    torch.testing.assert_close(pixel_norm(x).square().mean(1), torch.ones(3, 2, 2))
    system, growth = small(drift=0.5, target=3.0), Growth(1, 0.3)
    batch, draws = random_batch(system), g(4)
    real = shrink(batch.images, growth)
    fake = system.generator(torch.randn(4, 8, generator=draws), growth).detach()
    e = torch.rand(4, 1, 1, 1, generator=draws)
    between = (e * real + (1 - e) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(system.discriminator(between, growth).sum(), between)
    D = system.discriminator
    expected = D(fake, growth).mean() - D(real, growth).mean() + 0.5 * D(real, growth).square().mean()
    expected = expected + 10 / 9 * (gradient.flatten(1).norm(dim=1) - 3).square().mean()
    torch.testing.assert_close(system.discriminator_loss(batch, g(4), growth).value, expected)
    fake = system.generator(torch.randn(4, 8, generator=g(4)), growth)
    torch.testing.assert_close(system.generator_loss(batch, g(4), growth).value, -D(fake, growth).mean())
