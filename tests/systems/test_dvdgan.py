"""DVD-GAN: the recurrent unit is its formula, each discriminator sees its part, statistics stay within frames."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.systems.tiny import SMALLER, random_batch
from torch import Tensor

from bessemer.evaluation.sampling import sampling_mode
from bessemer.nn.conv_gru import ConvGRU
from bessemer.nn.init import init_weights
from bessemer.nn.update_state import begin_update, end_update
from bessemer.systems.registry import build
from bessemer.systems.video.dvdgan import DVDGAN
from bessemer.systems.video.dvdgan_networks import FrameNorm, pooled


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> DVDGAN:
    system = build("dvdgan", "tiny16", {**SMALLER["dvdgan"], **fields})
    assert isinstance(system, DVDGAN)
    system.init_weights(g())
    return system


def effective(layer: Any) -> Tensor:
    """W over its largest singular value by u, in float64."""
    W = layer.weight.detach().double()
    flat = W.flatten(1)
    v = F.normalize(flat.T @ layer.u.double(), dim=0)
    u = F.normalize(flat @ v, dim=0)
    return W / (u @ flat @ v)


def test_the_recurrent_unit_is_its_formula() -> None:
    """Term by term in float64, with the input and the state concatenated."""
    gru = ConvGRU(3)
    init_weights(gru, g(), "orthogonal")
    x = torch.randn(2, 5, 3, 4, 4, generator=g(1))
    h, expected = torch.zeros(2, 3, 4, 4, dtype=torch.float64), []

    def product(layer: Any, *parts: Tensor) -> Tensor:
        return F.conv2d(torch.cat(parts, 1), effective(layer), layer.bias.double(), padding=1)

    for t in range(5):
        now = x[:, t].double()
        r, u = (torch.sigmoid(product(layer, now, h)) for layer in (gru.reset, gru.update))
        h = u * h + (1 - u) * torch.relu(product(gru.candidate, now, r * h))
        expected.append(h)
    torch.testing.assert_close(gru(x, 5).double(), torch.stack(expected, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gru(x[:, :1], 4), gru(x[:, :1].expand(-1, 4, -1, -1, -1), 4), rtol=1e-5, atol=1e-6)


def test_frames_of_the_recurrent_unit_see_those_before_them_alone() -> None:
    gru = ConvGRU(2)
    init_weights(gru, g(), "orthogonal")
    x = torch.randn(1, 4, 2, 4, 4, generator=g(1)).requires_grad_()
    states = gru(x, 4)
    for t in range(4):
        (gradient,) = torch.autograd.grad(states[:, t].sum(), x, retain_graph=True)
        assert [bool(frame.any()) for frame in gradient[0]] == [s <= t for s in range(4)]


def test_the_spatial_discriminator_sees_the_chosen_frames_in_no_order_and_the_temporal_one_sees_motion() -> None:
    system = small(frames=8, spatial_frames=3)
    clips, labels = random_batch(system, 2)["clips"], torch.tensor([0, 2])
    chosen = torch.tensor([[1, 4, 6], [0, 2, 7]])
    with sampling_mode(system), torch.no_grad():
        D = system.discriminator
        spatial, temporal = D(clips, chosen, labels)
        again, _ = D(clips, chosen[:, [2, 0, 1]], labels)
        torch.testing.assert_close(again, spatial)
        other = clips.clone()
        other[:, [3, 5]] = 0.5  # chosen of neither clip
        assert torch.equal(D(other, chosen, labels)[0], spatial)
        assert not torch.equal(D(other, chosen, labels)[1], temporal)
        order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
        moved = D(clips[:, order], order.argsort()[chosen], labels)
        torch.testing.assert_close(moved[0], spatial)
        assert (moved[1] - temporal).abs().min() > 1e-4
        frame = D.spatial(clips[:1, 1:2], labels[:1])
        single = sum(D.spatial(clips[:1, t : t + 1], labels[:1]) for t in (1, 4, 6))
        torch.testing.assert_close(single, spatial[:1])
        assert not torch.equal(frame, single)


def test_the_temporal_discriminator_sees_means_of_2_by_2_pixels() -> None:
    clips = torch.randn(2, 3, 1, 4, 6, generator=g())
    expected = torch.zeros(2, 3, 1, 2, 3)
    for y in range(2):
        for x in range(3):
            expected[..., y, x] = clips[..., 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((-1, -2))
    torch.testing.assert_close(pooled(clips), expected)
    system = small()
    clips = random_batch(system, 2)["clips"]
    checkerboard = 0.5 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))  # nothing of it is left when pooled
    chosen, labels = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        spatial, temporal = system.discriminator(clips, chosen, labels)
        other = system.discriminator(clips + checkerboard, chosen, labels)
    torch.testing.assert_close(other[1], temporal, rtol=1e-4, atol=1e-4)
    assert (other[0] - spatial).abs().min() > 1e-3


def test_frames_for_the_spatial_discriminator_are_different_and_as_likely_as_each_other() -> None:
    system, seen = small(frames=8, spatial_frames=3), []
    system.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    clips, labels = torch.zeros(400, 8, 1, 16, 16), torch.zeros(400, dtype=torch.int64)
    with torch.no_grad():
        system._scores(clips, labels, g())
    (chosen,) = seen
    assert chosen.shape == (400, 3)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    counts = torch.bincount(chosen.flatten(), minlength=8)
    assert (counts - 150).abs().max() < 5 * (150 * 5 / 8) ** 0.5


def test_statistics_are_of_one_frame_and_gains_of_all() -> None:
    """A frame that is loud says nothing about the others."""
    system = small()
    c = system.config
    norm = FrameNorm(c, 3)
    init_weights(norm, g(), "orthogonal")
    x = torch.randn(6, 4, 3, 5, 5, generator=g(1))
    condition = torch.randn(6, c.latent_dim + c.shared_dim, generator=g(2))
    loud = x.clone()
    loud[:, 2] = 100 * loud[:, 2] + 7
    begin_update([norm])
    with torch.no_grad():
        quiet, same = (norm(v.flatten(0, 1), condition).view(6, 4, 3, 5, 5) for v in (x, loud))
    torch.testing.assert_close(same, quiet, rtol=1e-3, atol=1e-3)
    gain, bias = (
        F.linear(condition.double(), effective(part.linear))[:, None, :, None, None]
        for part in (norm.norm.gain, norm.norm.bias)
    )
    mean, var = x.double().mean((0, 3, 4), keepdim=True), x.double().var((0, 3, 4), keepdim=True, correction=0)
    expected = torch.relu((1 + gain) * (x.double() - mean) / (var + 1e-5).sqrt() + bias)
    torch.testing.assert_close(quiet.double(), expected, rtol=1e-4, atol=1e-4)


def test_losses_are_hinges_of_both() -> None:
    system = small()
    batch, seen, judged = random_batch(system), [], []
    system.discriminator.register_forward_hook(lambda *args: seen.append(args[2]))
    system.discriminator.register_forward_pre_hook(lambda _, inputs: judged.append(inputs))
    loss = system.discriminator_loss(batch, g(3))
    ((spatial, temporal),) = seen
    ((clips, _, labels),) = judged
    assert torch.equal(clips[4:], batch["clips"])
    assert torch.equal(labels[4:], batch.labels), "real clips are judged by their own classes"
    expected = sum(
        sum(max(0.0, 1 - s) for s in scores[4:].tolist()) / 4 + sum(max(0.0, 1 + s) for s in scores[:4].tolist()) / 4
        for scores in (spatial, temporal)
    )
    assert loss.value.item() == pytest.approx(expected, rel=1e-5)
    assert loss.scalars["scores/real"].item() == pytest.approx((spatial[4:] + temporal[4:]).mean().item(), rel=1e-5)
    value = system.generator_loss(batch, g(3)).value.item()
    assert value == pytest.approx(-(seen[1][0] + seen[1][1]).mean().item(), rel=1e-5)


def test_shapes_of_the_papers_settings() -> None:
    with torch.device("meta"):
        for preset, shape in {"kinetics600-64": (12, 3, 64, 64), "kinetics600-128": (12, 3, 128, 128)}.items():
            system = build("dvdgan", preset)
            assert isinstance(system, DVDGAN)
            labels = torch.zeros(1, dtype=torch.int64)
            clips = system.generate({"latents": torch.zeros(1, 120)}, labels)
            assert clips.shape == (1, *shape)
            scores = system.discriminator(clips, torch.zeros(1, 8, dtype=torch.int64), labels)
            assert [s.shape for s in scores] == [(1,), (1,)]


SIZES: dict[str, tuple[list[int], list[int]]] = {
    "kinetics600-64": ([768, 768, 768, 384, 192], [96, 192, 384, 768, 1536]),
    "kinetics600-128": ([768, 768, 768, 384, 192, 96], [96, 192, 384, 768, 1536, 1536]),
}
"""Channels of G at 4x4 pixels and after each stage, and of D's blocks: 96 times BigGAN's factors."""


@pytest.mark.parametrize("preset", SIZES)
def test_sizes_by_arithmetic(preset: str) -> None:
    """Section 3 and appendix A, layer by layer: nothing but the widths above is taken from the code."""
    g, d = SIZES[preset]
    condition = 240  # z and e(y), which every normalisation's gain and bias come from, without biases

    def conv(i: int, o: int, taps: int = 9) -> int:
        return i * o * taps + o

    def block(i: int, o: int, *, learned: bool) -> int:
        return 2 * condition * (i + o) + conv(i, o) + conv(o, o) + (conv(i, o, 1) if learned else 0)

    generator = 600 * 120 + condition * g[0] * 16 + g[0] * 16
    for i, o in pairwise(g):
        generator += 3 * conv(2 * i, i)  # reset, update and candidate, of the input and the state together
        generator += block(i, i, learned=False) + block(i, o, learned=True)
    generator += 2 * condition * g[-1] + conv(g[-1], 3)

    def judge(cubic: int) -> int:
        total = 0
        widths = [3, *d]
        for n, (i, o) in enumerate(pairwise(widths)):
            taps = 27 if n < cubic else 9
            shortcut = n < len(d) - 1 or i != o  # the last block neither halves nor, at 128 pixels, widens
            total += conv(i, o, taps) + conv(o, o, taps) + (conv(i, o, 1) if shortcut else 0)
        return total + d[-1] + 1 + 600 * d[-1]

    with torch.device("meta"):
        system = build("dvdgan", preset)
    found = {k: sum(p.numel() for p in n.parameters()) for k, n in system.networks().items()}
    assert found == {"generator": generator, "discriminator": judge(0) + judge(2)}


def test_statistics_move_once_per_update() -> None:
    system = small()
    norm = system.generator.stages[0].keep.norm1.norm
    begin_update([system.generator])
    before = norm.running_mean.clone()
    system.generator_loss(random_batch(system), g()).value.backward()
    assert torch.equal(norm.running_mean, before)
    end_update([system.generator])
    assert not torch.equal(norm.running_mean, before)


def test_more_frames_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(Exception, match="spatial_frames: 8 are more than the 4 frames"):
        build("dvdgan", "tiny16", {"frames": 4, "spatial_frames": 8})
