import pytest
import torch

from bessemer.systems.adversarial.stylegan2 import StyleGAN2
from bessemer.systems.adversarial.stylegan2_latents import mix_styles, noise_correlation, project, pyramid_distance
from bessemer.systems.registry import build

SMALL = {"resolution": 16, "latent_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 16}


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def system() -> StyleGAN2:
    made = build("stylegan2", "tiny32", overrides=SMALL)
    assert isinstance(made, StyleGAN2)
    made.init_weights(_g(9))
    with torch.no_grad():  # images inside [-1, 1]
        for block in made.generator.synthesis.blocks:
            block.to_rgb.weight.mul_(0.1)
    return made


def test_mixing_takes_the_chosen_layers_from_the_column(system: StyleGAN2) -> None:
    num_ws = system.generator.synthesis.num_ws
    grids = {k: mix_styles(system, 2, 3, range(k), _g(1)) for k in (0, 2, num_ws)}
    for grid in grids.values():
        assert grid.shape == (3, 4, 3, 16, 16)
        assert grid.abs().max() <= 1
        assert (grid[0, 0] == 0).all()
        torch.testing.assert_close(grid[0, 1:], grids[0][0, 1:])
        torch.testing.assert_close(grid[1:, 0], grids[0][1:, 0])
    for row in (1, 2):
        for column in (1, 2, 3):
            torch.testing.assert_close(grids[0][row, column], grids[0][row, 0])
            torch.testing.assert_close(grids[num_ws][row, column], grids[0][0, column])
            for same in (grids[0][row, 0], grids[0][0, column]):
                assert not torch.allclose(grids[2][row, column], same, atol=1e-2)
    assert system.generator.training, "its mode is restored"


def test_noise_correlation_by_loops() -> None:
    noise = [torch.randn(1, 1, r, r, generator=_g(r), dtype=torch.float64) for r in (4, 16)]
    total = 0.0
    for n in (noise[0], noise[1], noise[1].unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5)) / 2):
        size, m = n.shape[2], n[0, 0].tolist()
        for dy, dx in ((1, 0), (0, 1)):
            products = [m[y][x] * m[y - dy][x - dx] for y in range(size) for x in range(size)]
            total += (sum(products) / size**2) ** 2
    assert noise_correlation(noise).item() == pytest.approx(total)
    assert noise_correlation([torch.ones(1, 1, 8, 8)]).item() == 2


def test_projection_finds_the_image_again(system: StyleGAN2) -> None:
    before = {k: v.clone() for k, v in system.generator.state_dict().items()}
    G = system.generator
    with torch.no_grad():
        w = G.mapping(2 * torch.randn(1, 8, generator=_g(5)), torch.zeros(1, dtype=torch.long))
        target = G.synthesis(G.broadcast(w), G.synthesis.draw_noise(1, _g(6)))[0]
    assert target.abs().max() < 1
    found = project(system, target, _g(7), steps=120, draws=500)
    assert found.distance < 0.1 * found.start
    assert pyramid_distance(found.image[None], target[None]).item() == pytest.approx(found.distance, rel=0.05)
    for n in found.noise:
        assert n.mean().item() == pytest.approx(0, abs=1e-5)
        assert n.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert all(p.grad is None for p in G.parameters())
    again = project(system, target, _g(7), steps=120, draws=500)
    assert torch.equal(again.w, found.w)
