import pytest
import torch
from torch import nn

from bessemer.nn.attention import SelfAttention
from bessemer.nn.embedding import embedding
from bessemer.nn.init import WeightInit, init_weights
from bessemer.nn.norm import AffineBatchNorm
from bessemer.nn.spectral import SNConv2d, SNEmbedding, SNLinear


def _network() -> nn.Module:
    return nn.ModuleList(
        [SNConv2d(8, 16), SNLinear(64, 128), SNEmbedding(10, 32), embedding(5, 6), AffineBatchNorm(3), SelfAttention(8)]
    )


def _initialised(seed: int, weights: WeightInit = "orthogonal") -> nn.ModuleList:
    network = _network()
    init_weights(network, torch.Generator().manual_seed(seed), weights)
    return network  # type: ignore[return-value]


@pytest.mark.parametrize("weights", ["orthogonal", "normal", "xavier"])
def test_a_function_of_the_generator_alone(weights: WeightInit) -> None:
    state = torch.get_rng_state()
    first = _initialised(1, weights).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "construction or initialisation used the global generator"
    torch.manual_seed(123)
    second, other = _initialised(1, weights).state_dict(), _initialised(2, weights).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        constant = "running" in name or "gamma" in name or name.startswith("4.")
        assert constant == torch.equal(tensor, other[name]), name


def test_everything_is_set_after_building_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = _network()
    network = network.to_empty(device="cpu")
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data.fill_(float("nan"))
    init_weights(network, torch.Generator().manual_seed(1), "orthogonal")
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        assert torch.isfinite(tensor).all(), name
    for name, tensor in _initialised(1).state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_distributions() -> None:
    conv, linear = _initialised(0)[:2]
    W = conv.weight.detach().flatten(1)
    torch.testing.assert_close(W @ W.T, torch.eye(16))
    assert linear.bias.abs().max() <= 64**-0.5
    assert linear.bias.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.15)
    assert linear.u.norm().item() == pytest.approx(128**0.5, rel=0.15)
    assert _initialised(0, "normal")[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = (6 / (64 + 128)) ** 0.5
    xavier = _initialised(0, "xavier")[1].weight.abs().max().item()
    assert 0.98 * bound < xavier <= bound


def test_no_parameter_is_without_dimensions() -> None:
    assert all(p.ndim > 0 for p in _network().parameters())
