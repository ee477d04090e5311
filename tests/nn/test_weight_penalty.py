import torch
from torch import Tensor, nn

from bessemer.nn.convolutions import Conv2d, WNConv2d
from bessemer.nn.init import init_weights
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.weight_penalty import SpectralPenalty, largest_gains


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _network() -> nn.Sequential:
    network = nn.Sequential(
        WNConv2d(3, 6), Conv2d(6, 6, 5, groups=6, bias=False), AffineBatchNorm(6), WNConv2d(6, 6, 1), WNConv2d(6, 6, 1)
    ).double()
    init_weights(network, _g(), "uniform")
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, WNConv2d):
                layer.log_gain += torch.randn(layer.log_gain.shape, generator=_g(3))
    return network


def _matrices(network: nn.Sequential) -> list[Tensor]:
    return [layer.effective_weight().flatten(1) for layer in network if isinstance(layer, Conv2d)]


def test_singular_values_and_their_gradients_are_those_of_the_svd() -> None:
    network = _network()
    penalty = SpectralPenalty(network).double()
    penalty.reset(_g(1), iterations=3000)
    expected = torch.stack([torch.linalg.matrix_norm(W, 2) for W in _matrices(network)])
    torch.testing.assert_close(penalty.singular_values().sort().values, expected.sort().values)
    weights = [p for p in network.parameters() if p.ndim == 4]
    theirs = torch.autograd.grad(expected.sum(), weights)
    for ours, other in zip(torch.autograd.grad(penalty(), weights), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)


def test_vectors_follow_the_weights_once_per_update_and_are_kept() -> None:
    network = _network()
    penalty = SpectralPenalty(network, iterations=2).double()
    penalty.reset(_g(1), iterations=1)
    kept = {k: v.clone() for k, v in penalty.state_dict().items()}
    assert len(kept) == 3, "one for each shape of weights"
    penalty()
    assert all(torch.equal(v, kept[k]) for k, v in penalty.state_dict().items())
    before = penalty().item()
    penalty.begin_update()
    assert all(not torch.equal(v, kept[k]) for k, v in penalty.state_dict().items())
    true = sum(torch.linalg.matrix_norm(W, 2).item() for W in _matrices(network))
    assert before < penalty().item() <= true
    other = SpectralPenalty(network, iterations=2).double()
    other.load_state_dict(kept)
    other.begin_update()
    assert other().item() == penalty().item()


def test_the_penalty_owns_no_weights() -> None:
    assert not list(SpectralPenalty(_network()).parameters())


def test_largest_gains() -> None:
    network = nn.Sequential(AffineBatchNorm(2), AffineBatchNorm(3), AffineBatchNorm(2))
    for layer, gains in zip(network, ([1.0, -4.0], [0.5, 0.2, 0.1], [2.0, 1.0]), strict=True):
        layer.gain.data = torch.tensor(gains)  # type: ignore[union-attr]
    total = largest_gains(network)
    assert total.item() == 4 + 0.5 + 2
    total.backward()
    assert network[0].gain.grad.tolist() == [0, -1]  # type: ignore[union-attr]
