import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bessemer.nn.convolutions import Conv2d
from bessemer.nn.likelihoods import LogisticMixture, quantise
from bessemer.nn.norm import BatchNorm
from bessemer.nn.update_state import UpdateStateLayer, begin_update
from bessemer.nn.weight_penalty import largest_gains
from bessemer.systems.autoencoding.nvae import NVAE, NVAEConfig, balance
from bessemer.systems.contract import Batch, Clock
from bessemer.systems.registry import build

# Parameters, latent variables, convolutions and BN layers, from instantiating the published models.
PAPER = {
    "mnist": (33_363_134, 14_400, 255, 214),
    "cifar10": (130_852_480, 153_600, 610, 364),
    "imagenet32": (268_509_444, 143_360, 570, 340),
    "celeba64": (153_281_364, 467_200, 730, 436),
    "celebahq256": (330_798_664, 6_005_760, 986, 460),
    "ffhq256": (330_798_664, 6_005_760, 986, 460),
}
SMALL = {
    "width": 4, "groups": (2, 1), "latent_channels": 2, "components": 2, "standing_passes": 3, "standing_batch": 4,
    "resolution": 16,
}  # fmt: skip


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small(seed: int = 9, **fields: Any) -> NVAE:
    system = build("nvae", "tiny32", {**SMALL, **fields})
    assert isinstance(system, NVAE)
    system.init_weights(_g(seed))
    return system


def _batch(n: int = 4, seed: int = 5, channels: int = 3, size: int = 16) -> Batch:
    images = quantise(2 * torch.rand(n, channels, size, size, generator=_g(seed)) - 1, 8)
    return Batch(images, torch.zeros(n, dtype=torch.int64))


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_models(preset: str) -> None:
    with torch.device("meta"):
        network = build("nvae", preset).networks()["vae"]
    layers = list(network.modules())
    convolutions, norms = (sum(isinstance(m, kind) for m in layers) for kind in (Conv2d, BatchNorm))
    parameters, _, *expected = PAPER[preset]
    assert [_count(network), convolutions, norms] == [parameters, *expected]
    assert all(p.ndim > 0 for p in network.parameters())


@pytest.mark.parametrize("preset", ["mnist", "celeba64", "ffhq256"])
def test_shapes_of_the_papers_models(preset: str) -> None:
    with torch.device("meta"):
        system = build("nvae", preset)
        assert isinstance(system, NVAE)
        c = system.config
        shapes: list[torch.Size] = []
        for group in system.vae.groups:
            group.combine.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))  # type: ignore[union-attr,operator]
        parameters, draws = system._encoded(torch.zeros(1, c.channels, c.resolution, c.resolution), _Meta())
    assert sum(c.latent_channels * s[2] * s[3] for s in shapes) == PAPER[preset][1]
    assert parameters.shape == (1, 1 if preset == "mnist" else 100, c.resolution, c.resolution)
    assert len(draws) == sum(c.groups)


class _Meta(torch.Generator):
    """Stands for a generator where there are no values to draw."""

    device = torch.device("meta")  # type: ignore[misc,assignment]


@pytest.mark.parametrize(("flows", "count"), [(0, 467_888), (1, 740_688)])
def test_a_small_published_configuration(flows: int, count: int) -> None:
    with torch.device("meta"):
        system = build("nvae", "cifar10", {"width": 16, "groups": (5,), "flows": flows})
    assert _count(system.networks()["vae"]) == count


def test_hyper_parameters_are_the_papers() -> None:
    with torch.device("meta"):
        cifar, ffhq = build("nvae", "cifar10"), build("nvae", "ffhq256")
    adamax = cifar.optimizers()["vae"]
    assert (adamax.name, adamax.lr, adamax.betas, adamax.eps, adamax.weight_decay) == (
        "adamax", 1e-2, (0.9, 0.999), 1e-3, 3e-4,
    )  # fmt: skip
    assert ffhq.optimizers()["vae"].lr == 8e-3
    assert isinstance(ffhq, NVAE)
    assert (ffhq.config.bits, ffhq.config.spectral, ffhq.config.flows) == (5, 0.1, 2)


def test_loss_by_hand() -> None:
    system, batch = _small(kl_warmup_kimg=10.0, spectral=0.1, spectral_start=2.0), _batch()
    beta = system.kl_weight(Clock(2500, 0))
    parameters, draws = system._encoded(batch.images, _g(2))
    kl = torch.stack([draw.kl for draw in draws])
    assert kl.shape == (3, 4)
    gamma = (kl.mean(1) + 0.01) / torch.tensor([1.0, 2.0, 2.0])  # 4×4 pixels in one group, 8×8 in two
    gamma = gamma * 3 / gamma.sum()
    nats = -LogisticMixture(parameters, channels=3).log_prob(batch.images) + beta * (gamma[:, None] * kl).sum(0)
    penalty = 2.0**0.75 * 0.1**0.25 * (system.vae.penalty() + largest_gains(system.vae))
    loss = system.updates(Clock(2500, 0))[0].loss(batch, _g(2))
    torch.testing.assert_close(loss.value, nats.mean() + penalty)
    torch.testing.assert_close(loss.scalars["elbo/kl"], kl.sum(0).mean().detach())
    assert not any(s.requires_grad or s.ndim for s in loss.scalars.values())
    late = system.updates(Clock(10_000, 0))[0].loss(batch, _g(2))
    plain = -LogisticMixture(parameters, channels=3).log_prob(batch.images) + kl.sum(0)
    torch.testing.assert_close(late.value - late.scalars["loss/spectral"], plain.mean())
    bits = plain.mean() / (math.log(2) * 3 * 16 * 16)
    torch.testing.assert_close(late.scalars["elbo/bits_per_dim"], bits.detach())


def test_schedules() -> None:
    system = _small(kl_warmup_kimg=10.0, spectral=0.01, spectral_start=1.0)
    betas = [system.kl_weight(Clock(n, 0)) for n in (0, 5000, 10_000, 50_000)]
    assert betas == [1e-4, 0.5, 1.0, 1.0]
    assert [system.spectral_weight(b) for b in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.1, 0.01])
    assert _small(kl_warmup_kimg=0.0).kl_weight(Clock(0, 0)) == 1.0
    assert _small(spectral=0.3).spectral_weight(0.5) == 0.3


def test_balancing_coefficients() -> None:
    kl = torch.tensor([[4.0, 2.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    gamma = balance(kl, torch.tensor([1.0, 1.0, 2.0]))
    assert gamma.tolist() == pytest.approx([x / (3.525 / 3) for x in (3.01, 0.51, 0.005)])
    assert gamma.mean().item() == pytest.approx(1)
    assert not gamma.requires_grad


@pytest.mark.parametrize("flows", [0, 1])
def test_elbo_is_below_the_importance_weighted_bound(flows: int) -> None:
    system, batch = _small(flows=flows), _batch(6)
    system.vae.eval()
    g = _g(3)
    single = torch.stack([system.log_likelihood(batch, g) for _ in range(8)])
    bound = system.log_likelihood(batch, _g(3), 8)  # of the same eight draws
    torch.testing.assert_close(bound, torch.logsumexp(single, 0) - math.log(8))
    assert (bound > single.mean(0)).all()
    parameters, draws = system._encoded(batch.images, _g(3))
    first = LogisticMixture(parameters, channels=3).log_prob(batch.images) + sum(d.log_p - d.log_q for d in draws)
    torch.testing.assert_close(single[0], first.double(), rtol=1e-6, atol=0)
    if not flows:  # a single draw's ratio has the mean of the closed form
        kls = torch.stack([d.log_q - d.log_p for _ in range(200) for d in system._encoded(batch.images, g)[1][:1]])
        error = kls.std(0) / 200**0.5
        assert ((kls.mean(0) - draws[0].kl).abs() < 5 * error).all()
    else:
        torch.testing.assert_close(draws[0].kl, draws[0].log_q - draws[0].log_p)


@pytest.mark.parametrize("flows", [0, 2])
@torch.no_grad()
def test_importance_weights_have_mean_one(flows: int) -> None:
    """E_q[p(z)/q(z)] = ∫ p(z) dz for each group: densities of the posterior are right, and flows keep the volume."""
    n = 20_000
    system = _small(resolution=8, groups=(2,), latent_channels=1, flows=flows)
    system.vae.eval()
    s, g = torch.randn(n, 8, 4, 4, generator=_g(1)), _g(3)
    for group in system.vae.groups:
        for layer in (group.posterior, *group.flows):  # type: ignore[union-attr]
            for key, p in layer.named_parameters():  # type: ignore[union-attr]
                if key.endswith("log_gain"):  # a posterior near the prior, so that the weights vary little
                    p -= 1.5
        s, prior = group.prepare(s)  # type: ignore[operator]
        z, draw = group.infer(s, prior, torch.randn(n, 8, 4, 4, generator=g), torch.randn(n, 1, 4, 4, generator=g))  # type: ignore[operator]
        weights = torch.exp(draw.log_p - draw.log_q).double()
        error = weights.std() / n**0.5
        assert error < 0.05
        assert weights.std() > 0.1
        assert abs(weights.mean() - 1) < 4 * error
        s = group.join(s, z)  # type: ignore[operator]


def test_the_flow_changes_the_posterior_and_nothing_else() -> None:
    system, batch = _small(flows=1), _batch()
    system.vae.eval()
    group = system.vae.groups[0]
    before = system.log_likelihood(batch, _g()), system.sample(batch.labels, _g())
    with torch.no_grad():
        for flow in group.flows:  # type: ignore[union-attr]
            flow.conv3.bias += 0.5  # type: ignore[operator,union-attr]
    assert not torch.equal(system.log_likelihood(batch, _g()), before[0])
    assert torch.equal(system.sample(batch.labels, _g()), before[1])


@torch.no_grad()
def test_a_posterior_that_changes_nothing_makes_inference_generation() -> None:
    """The two ways down through the groups, `forward` and `generate`, are one network."""
    system = _small()
    for group in system.vae.groups:
        nn.init.zeros_(group.posterior.weight)  # type: ignore[arg-type,union-attr]
        nn.init.zeros_(group.posterior.bias)  # type: ignore[arg-type,union-attr]
    system.vae.eval()
    noise = system.vae.draw_noise(4, _g(1))
    parameters, draws = system.vae(_batch().images, noise)
    # The top group's prior is N(0, 1), and σ of a posterior is 0.01 + e^0.
    torch.testing.assert_close(parameters, system.vae.generate([1.01 * noise[0], *noise[1:]]))
    of_top = (1.01**2 - 1) / 2 - math.log(1.01)
    torch.testing.assert_close(draws[0].kl, torch.full((4,), of_top * noise[0][0].numel()), rtol=1e-3, atol=1e-5)
    assert all(not draw.kl.any() for draw in draws[1:])


@torch.no_grad()
def test_the_prior_of_a_group_sees_the_groups_above_it() -> None:
    vae = _small().vae.eval()

    def priors(noise: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []

        def draw(group: Any, s: Tensor, prior: Tensor, i: int) -> Tensor:
            found.append(prior)
            return group.prior_of(prior).at(noise[i])  # type: ignore[no-any-return]

        vae._descend(2, draw)
        return found

    noise = vae.draw_noise(2, _g(1))
    before = priors(noise)
    for i in range(3):
        after = priors([n + (i == j) for j, n in enumerate(noise)])
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [j > i for j in range(3)]


def test_temperature() -> None:
    system = _small()
    system.vae.eval()
    images = system.sample(torch.zeros(3, dtype=torch.int64), _g(1))
    torch.testing.assert_close(images, quantise(images, 8), msg="mixtures are drawn from")
    parameters = [
        system.vae.generate(system.vae.draw_noise(64, _g(seed)), t) for seed, t in ((1, 1.0), (2, 0.5), (3, 0.0))
    ]
    spread = [p.std(0).mean().item() for p in parameters]
    assert spread[0] > spread[1] > spread[2] == 0


def test_what_is_generated_is_the_mean_of_what_is_sampled() -> None:
    """Of the same noise, at a temperature; the logistics are so narrow here that draws lie near their mean."""
    system, labels, g = _small(components=1), torch.zeros(3, dtype=torch.int64), _g(1)
    last: Any = system.vae.image[1]
    with torch.no_grad():
        last.log_gain.fill_(0.5)
        last.weight[[2, 5, 8]], last.bias[[2, 5, 8]] = 0.0, -7.0  # log scales of the colours
    system.vae.eval()
    noise = {name: torch.randn(3, *shape, generator=g) for name, shape in system.latent_shapes.items()}
    assert list(noise) == ["latents_1", "latents_2", "latents_3"]
    with torch.no_grad():
        generated, other = system.generate(noise, labels, 0.6), system.generate(noise, labels)
    torch.testing.assert_close(system.sample(labels, _g(1), 0.6), generated, rtol=0, atol=0.03)
    assert generated.std() > 0.1
    assert (generated - other).abs().max() > 0.1


def test_black_and_white() -> None:
    system = build("nvae", "tiny28", {"width": 2})
    assert isinstance(system, NVAE)
    assert system.config.padded_resolution == 32
    system.init_weights(_g())
    grey = Batch(torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64))
    seen: list[Tensor] = []
    system.vae.stem.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    first, second = (system.loss(grey, _g(i)).value for i in (1, 2))
    assert first != second, "grey images are binarised anew"
    inside = seen[0][:, :, 2:30, 2:30]
    assert set(inside.unique().tolist()) == {-1.0, 1.0}
    assert abs(inside.mean().item()) < 0.1
    assert seen[0].sum() == inside.sum() - 2 * (32 * 32 - 28 * 28), "the border is black"
    system.vae.eval()
    images = system.sample(grey.labels, _g())
    assert images.shape == (2, 1, 28, 28)
    assert len(images.unique()) > 100, "probabilities are shown"
    assert system.reconstruct(grey, _g()).shape == (2, 1, 28, 28)


def test_statistics_for_sampling_equal_an_independent_average() -> None:
    system = _small()
    layer = system.vae.postprocess[0].branch[0]  # type: ignore[index,union-attr]
    before = copy.deepcopy(system.vae.state_dict())
    inputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, args, out: inputs.append(args[0]))  # type: ignore[operator,union-attr]
    system.vae.eval()
    system.prepare_sampling(torch.zeros(5), _g(1), 0.6)
    handle.remove()  # type: ignore[union-attr]
    assert [len(x) for x in inputs] == [4, 4, 4]
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))  # type: ignore[union-attr]
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))  # type: ignore[union-attr]
    moved = {k for k, v in system.vae.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all("running" in k and k.startswith(("groups", "ups", "postprocess")) for k in moved), "not the encoder's"
    assert not system.vae.training
    at_06 = layer.running_var.clone()  # type: ignore[union-attr,operator]
    system.prepare_sampling(torch.zeros(5), _g(1), 0.1)
    assert not torch.equal(layer.running_var, at_06), "statistics are those of the sampling temperature"  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("flows", [0, 1])
def test_activation_checkpointing_changes_memory_only(flows: int) -> None:
    found = []
    for recompute in (False, True):
        system = _small(recompute=recompute, flows=flows)
        begin_update([system.vae])
        loss = system.loss(_batch(), _g(), beta=0.5).value
        loss.backward()
        found.append((loss, [p.grad for p in system.vae.parameters()], _pending(system)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))  # type: ignore[arg-type]
    assert torch.equal(found[0][2], found[1][2]), "statistics are counted once"


def _pending(system: NVAE) -> Tensor:
    layers = [m for m in system.vae.modules() if isinstance(m, UpdateStateLayer)]
    return torch.cat([t.reshape(-1).clone() for layer in layers for t in layer.pending()])


def test_bfloat16_stays_close() -> None:
    system = _small(flows=1)
    full = system.loss(_batch(), _g(), beta=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = system.loss(_batch(), _g(), beta=0.5)
    assert half.value.dtype == torch.float32
    torch.testing.assert_close(half.value, full.value, rtol=0.02, atol=0)
    torch.testing.assert_close(half.scalars["loss/spectral"], full.scalars["loss/spectral"])


def test_learning_lowers_the_loss() -> None:
    system = _small(kl_warmup_kimg=0.0)
    optimizer = torch.optim.Adamax(system.vae.parameters(), lr=1e-2, eps=1e-3)
    values = []
    for step in range(15):
        begin_update([system.vae])
        optimizer.zero_grad()
        loss = system.loss(_batch(8, seed=1), _g(step))
        loss.value.backward()
        optimizer.step()
        values.append(loss.scalars["elbo/bits_per_dim"].item())
    means = [sum(values[i : i + 5]) for i in (0, 5, 10)]
    assert all(after < before for before, after in pairwise(means))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 8, "groups": (1, 1, 1, 1)}, "too many scales"),
        ({"resolution": 31, "groups": (1,)}, "even"),
        ({"output": "bernoulli", "bits": 5}, "leave bits at 8"),
        ({"spectral": 0.0, "spectral_start": 1.0}, "spectral_start"),
        ({"groups": ()}, "at least one scale"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NVAEConfig.model_validate({"resolution": 32, **fields})
