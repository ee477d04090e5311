import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bessemer.nn.embedding import embedding
from bessemer.nn.init import init_weights
from bessemer.nn.norm import (
    AffineBatchNorm,
    BatchNorm,
    ConditionalBatchNorm,
    renew_statistics,
    statistics_not_counted,
)
from bessemer.nn.spectral import SNLinear
from bessemer.nn.update_state import begin_update, end_update


def _slices(count: int, channels: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [3 * torch.randn(4, channels, 3, 3, generator=g) + i for i in range(count)]


def test_one_slice_is_pytorchs_batch_norm() -> None:
    (x,) = _slices(1)
    theirs = nn.BatchNorm2d(5, eps=1e-4, momentum=0.3)
    ours = AffineBatchNorm(5, eps=1e-4, momentum=0.3)
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(5, generator=torch.Generator().manual_seed(1)))
        theirs.bias.copy_(torch.rand(5, generator=torch.Generator().manual_seed(2)))
        ours.gain.copy_(theirs.weight)
        ours.bias.copy_(theirs.bias)
    begin_update([ours])
    torch.testing.assert_close(ours(x), theirs(x))
    end_update([ours])
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(BatchNorm(5)(x), F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("kind", [BatchNorm, AffineBatchNorm])
def test_vectors_are_normalised_as_pytorch_does(kind: type[BatchNorm]) -> None:
    """[N, C] gives what maps of one pixel give, and leaves the same running statistics."""
    x = _slices(1)[0].flatten(2).movedim(1, 2).flatten(0, 1)
    layer, theirs = kind(5), nn.BatchNorm1d(5)
    begin_update([layer])
    torch.testing.assert_close(layer(x), theirs(x))
    end_update([layer])
    torch.testing.assert_close(layer.running_var, theirs.running_var)
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))


def test_running_statistics_take_one_step_to_the_mean_over_slices() -> None:
    layer, slices = BatchNorm(5, momentum=0.3), _slices(3)
    for _ in range(2):
        begin_update([layer])
        for x in slices:
            torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))
        assert not torch.equal(layer.sum_mean, torch.zeros(5))
        end_update([layer])
    means = torch.stack([x.mean((0, 2, 3)) for x in slices]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in slices]).mean(0)
    torch.testing.assert_close(layer.running_mean, means * (1 - 0.7**2))
    torch.testing.assert_close(layer.running_var, 0.7**2 + variances * (1 - 0.7**2))


def test_an_update_without_slices_changes_nothing() -> None:
    layer = BatchNorm(5)
    begin_update([layer])
    end_update([layer])
    assert torch.equal(layer.running_mean, torch.zeros(5))
    assert torch.equal(layer.running_var, torch.ones(5))


def test_eval_mode_collects_nothing() -> None:
    layer = BatchNorm(5).eval()
    layer(_slices(1)[0])
    assert layer.slices.item() == 0


def test_conditional_formula() -> None:
    (x,) = _slices(1)
    condition = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    layer = ConditionalBatchNorm(5, SNLinear(6, 5, bias=False), SNLinear(6, 5, bias=False))
    init_weights(layer, torch.Generator().manual_seed(3), "orthogonal")
    gain = 1 + condition @ (layer.gain.weight / layer.gain.sigma()).T  # type: ignore[operator,union-attr]
    bias = condition @ (layer.bias.weight / layer.bias.sigma()).T  # type: ignore[operator,union-attr]
    for training in (True, False):
        layer.train(training)
        mean = x.mean((0, 2, 3), keepdim=True) if training else layer.running_mean.view(1, -1, 1, 1)
        var = x.var((0, 2, 3), unbiased=False, keepdim=True) if training else layer.running_var.view(1, -1, 1, 1)
        expected = (x - mean) / (var + 1e-5).sqrt() * gain[:, :, None, None] + bias[:, :, None, None]
        torch.testing.assert_close(layer(x, condition), expected)


def test_conditional_on_a_class_index() -> None:
    (x,) = _slices(1)
    layer = ConditionalBatchNorm(5, embedding(3, 5), embedding(3, 5))
    init_weights(layer, torch.Generator().manual_seed(3), "normal")
    labels = torch.tensor([2, 0, 1, 2])
    out = layer(x, labels)
    plain = F.batch_norm(x, None, None, training=True)
    for i, label in enumerate(labels):
        gain, bias = layer.gain.weight[label], layer.bias.weight[label]  # type: ignore[index,union-attr]
        torch.testing.assert_close(out[i], plain[i] * (1 + gain)[:, None, None] + bias[:, None, None])


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training: bool) -> None:
    layer = AffineBatchNorm(2).double().train(training)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_statistics_of_a_later_slice_leave_the_graph_of_an_earlier_one_alone() -> None:
    layer = AffineBatchNorm(5)
    first, second = (x.requires_grad_() for x in _slices(2))
    (expected,) = torch.autograd.grad(layer(first).square().sum(), layer.gain)
    loss = layer(first).square().sum()
    layer(second)
    begin_update([layer])
    (actual,) = torch.autograd.grad(loss, layer.gain)
    assert torch.equal(actual, expected)


def test_standing_statistics_are_an_independent_average() -> None:
    slices = _slices(6)
    network = nn.Sequential(BatchNorm(5, momentum=0.1), nn.ReLU(), AffineBatchNorm(5)).eval()
    waiting = iter(slices)
    renew_statistics(network, lambda: network(next(waiting)), passes=6)
    second = [F.relu(F.batch_norm(x, None, None, training=True)) for x in slices]
    for layer, inputs in ((network[0], slices), (network[2], second)):
        torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
        torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))
        assert layer.slices.item() == 0
    assert not any(m.training for m in network.modules())


def test_sums_are_not_saved() -> None:
    assert set(BatchNorm(3).state_dict()) == {"running_mean", "running_var"}


def test_passes_that_repeat_another_are_not_counted() -> None:
    layer, (x,) = AffineBatchNorm(5), _slices(1)
    begin_update([layer])
    first = layer(x)
    sums = [t.clone() for t in layer.pending()]
    with statistics_not_counted():
        assert torch.equal(layer(x), first)
    assert all(torch.equal(a, b) for a, b in zip(layer.pending(), sums, strict=True))
    layer(x)
    assert layer.slices.item() == 2
