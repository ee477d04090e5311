import torch
import torch.nn.functional as F

from bessemer.nn.attention import SelfAttention
from bessemer.nn.init import init_weights


def _attention(dtype: torch.dtype = torch.float32) -> tuple[SelfAttention, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    layer = SelfAttention(16)
    init_weights(layer, g, "orthogonal")
    return layer.to(dtype), torch.randn(2, 16, 6, 4, generator=g, dtype=dtype)


def test_rows_of_the_map_are_distributions_over_a_quarter_of_the_pixels() -> None:
    layer, x = _attention()
    beta = layer.attention_map(x)
    assert beta.shape == (2, 24, 6)
    assert (beta > 0).all()
    torch.testing.assert_close(beta.sum(2), torch.ones(2, 24))


def test_starts_as_the_identity_and_gamma_has_a_dimension() -> None:
    layer, x = _attention()
    assert torch.equal(layer(x), x)
    assert layer.gamma.shape == (1,)


def test_output_by_explicit_sums() -> None:
    layer, x = _attention(torch.float64)
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    weight = {k: getattr(layer, k).normalised_weight()[:, :, 0, 0] for k in ("theta", "phi", "g", "o")}

    def project(name: str) -> torch.Tensor:
        return torch.einsum("oi,nihw->nohw", weight[name], x)

    theta, phi, g = project("theta"), F.max_pool2d(project("phi"), 2), F.max_pool2d(project("g"), 2)
    expected = x.clone()
    for n in range(2):
        for row in range(6):
            for column in range(4):
                scores = torch.stack([theta[n, :, row, column] @ phi[n, :, a, b] for a in range(3) for b in range(2)])
                values = torch.stack([g[n, :, a, b] for a in range(3) for b in range(2)])
                expected[n, :, row, column] += 0.7 * weight["o"] @ (torch.softmax(scores, 0) @ values)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)


def test_parameters_are_sagans() -> None:
    C = 64
    assert sum(p.numel() for p in SelfAttention(C).parameters()) == 2 * C * C // 8 + 2 * C * C // 2 + 1
