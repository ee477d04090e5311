import torch
from torch import nn

from bessemer.nn.norm import BatchNorm
from bessemer.nn.update_state import begin_update, end_update


def test_workers_together_commit_what_one_worker_would() -> None:
    g = torch.Generator().manual_seed(0)
    slices = [torch.randn(4, 3, 2, 2, generator=g) for _ in range(4)]
    alone, first, second = BatchNorm(3), BatchNorm(3), BatchNorm(3)
    begin_update([alone, first, second])
    for x in slices:
        alone(x)
    for x in slices[:3]:
        first(x)
    second(slices[3])
    end_update([alone])
    shares = [torch.cat(layer.pending()) for layer in (first, second)]
    for layer in (first, second):
        end_update([layer], all_reduce=lambda flat: flat.copy_(shares[0] + shares[1]))
        torch.testing.assert_close(layer.running_mean, alone.running_mean)
        torch.testing.assert_close(layer.running_var, alone.running_var)


def test_one_flat_reduction_over_all_layers_in_training() -> None:
    network, frozen = nn.Sequential(BatchNorm(3), BatchNorm(2)), BatchNorm(7).eval()
    sizes = []
    begin_update([network, frozen])
    end_update([network, frozen], all_reduce=lambda flat: sizes.append(flat.shape))
    assert sizes == [(3 + 3 + 1 + 2 + 2 + 1,)]
    end_update([nn.Linear(1, 1)], all_reduce=lambda flat: sizes.append(flat.shape))
    assert len(sizes) == 1, "networks without such layers must not communicate"


def test_a_number_travels_with_the_sums_and_nothing_is_committed_before_it_is_asked() -> None:
    layer, count = BatchNorm(2), torch.tensor(3.0)
    state = begin_update([layer])
    layer(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    before, shares = layer.running_mean.clone(), [t.clone() for t in layer.pending()]
    sizes = []
    state.sum(lambda flat: (sizes.append(flat.numel()), flat.mul_(2)), count)
    assert sizes == [2 + 2 + 1 + 1]
    assert count == 6
    assert all(torch.equal(total, 2 * share) for total, share in zip(layer.pending(), shares, strict=True))
    assert torch.equal(layer.running_mean, before)
    state.commit()
    assert not torch.equal(layer.running_mean, before)
