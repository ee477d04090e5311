"""What every system must do, whatever its kind. A new system is met here as soon as the registry finds it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.systems.tiny import random_batch, tiny_arguments, tiny_system
from torch import Tensor

from bessemer.evaluation.sampling import sampling_mode
from bessemer.nn.update_state import begin_update, end_update
from bessemer.orchestration.planning import plan_job
from bessemer.spec.job import GuardsSpec
from bessemer.spec.load import load_job
from bessemer.systems.contract import Clock, System, Update
from bessemer.systems.likelihood import LikelihoodSystem
from bessemer.systems.registry import all_systems, build, get, rebuild, resolve_config
from bessemer.training.collapse import CollapseWatch, class_distances
from bessemer.training.distributed import Workers
from bessemer.training.plan import target
from bessemer.training.rng import generator

JOBS = [load_job(path) for path in sorted((Path(__file__).resolve().parents[2] / "jobs").glob("*.yaml"))]
LAYERS = "take them from bessemer.nn, or mix in bessemer.nn.unset.Unset, and draw in init_weights"
GLOBAL = "draw from the generator that is handed in"
every_system = pytest.mark.parametrize("name", list(all_systems()))


def g(*purpose: int | str) -> torch.Generator:
    return generator("cpu", 1, *purpose)


def only(system: System, update: Update) -> None:
    """Freeze all networks but that of `update`, as the engines do."""
    for name, network in system.networks().items():
        network.requires_grad_(name == update.network)


def tensors(system: System) -> dict[str, Tensor]:
    return {f"{n}.{k}": v for n, network in system.networks().items() for k, v in network.state_dict().items()}


@every_system
def test_builds_without_memory_and_without_drawing(name: str) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        system = build(*tiny_arguments(name))
    built = build(*tiny_arguments(name))
    assert torch.equal(torch.get_rng_state(), state), f"layers drew as they were built: {LAYERS}"
    assert all(t.is_meta for t in tensors(system).values())
    assert sum(t.numel() for t in tensors(built).values()) == sum(t.numel() for t in tensors(system).values())
    assert set(system.optimizers()) == set(system.networks())
    assert set(system.sampled_networks) <= set(system.networks())
    for network in system.networks().values():
        assert all(p.ndim > 0 for p in network.parameters()), "DeepSpeed cannot shard a parameter without dimensions"
        assert sum(p.numel() for p in network.parameters())


@every_system
def test_configuration_goes_through_json_and_back(name: str) -> None:
    with torch.device("meta"):
        system = build(*tiny_arguments(name))
        again = rebuild(name, system.config.model_dump(mode="json"))
    assert again.config == system.config
    for preset in get(name).presets:
        config = resolve_config(name, preset)
        assert type(config).model_validate_json(config.model_dump_json()) == config, preset
    shapes = {k: v.shape for k, v in tensors(system).items()}
    assert {k: v.shape for k, v in tensors(again).items()} == shapes


@every_system
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    first, second, other = (tensors(tiny_system(name, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())
    assert all(v.isfinite().all() for v in first.values())


def everything(name: str) -> list[Tensor]:
    """Losses and gradients of all stages, samples and, if there are any, likelihoods and reconstructions."""
    system = tiny_system(name)
    out: list[Tensor] = []
    for number, start in enumerate(system.stage_starts()):
        for update in system.updates(start):
            only(system, update)
            begin_update(system.networks().values())
            loss = update.loss(random_batch(system, 4, number), g(update.name))
            loss.value.backward()
            end_update(system.networks().values())
            network = system.networks()[update.network]
            out += [loss.value.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]
            network.zero_grad(set_to_none=True)
    batch = random_batch(system)
    with sampling_mode(system), torch.no_grad():
        if isinstance(system, LikelihoodSystem):
            out.append(system.log_likelihood(batch, g("likelihood")))
        if (reconstruct := getattr(system, "reconstruct", None)) is not None:
            out.append(reconstruct(batch, g("reconstruct")))
        system.prepare_sampling(batch.labels, g("prepare"), None)
        out.append(system.sample_for(batch, g("sample")))
    return out


@every_system
def test_nothing_is_drawn_from_the_global_generator(name: str) -> None:
    state = torch.get_rng_state()
    first = everything(name)
    assert torch.equal(torch.get_rng_state(), state), GLOBAL
    torch.manual_seed(123)
    for a, b in zip(first, everything(name), strict=True):
        assert torch.equal(a, b), GLOBAL
        assert a.isfinite().all()


@every_system
def test_updates_reach_their_own_network_alone_and_all_of_it(name: str) -> None:
    system, met = tiny_system(name), set()
    for start in system.stage_starts():
        for update in system.updates(start):
            only(system, update)
            loss = update.loss(random_batch(system), g(update.name))
            assert loss.value.ndim == 0
            for key, scalar in loss.scalars.items():
                assert not scalar.requires_grad, f"{key}: detach it"
                assert scalar.ndim == 0, f"{key}: take its mean"
            loss.value.backward()
            for key, network in system.networks().items():
                for k, p in network.named_parameters():
                    assert key == update.network or p.grad is None, f"{update.name} reaches {key}.{k}"
                    if p.grad is not None:
                        met.add(f"{key}.{k}")
                network.zero_grad(set_to_none=True)
    every = {f"{n}.{k}" for n, network in system.networks().items() for k, _ in network.named_parameters()}
    assert met == every, "these have no gradient in any stage: " + ", ".join(sorted(every - met))


@every_system
def test_bfloat16_keeps_losses_and_gradients_finite(name: str) -> None:
    system = tiny_system(name)
    for update in system.every_update():
        only(system, update)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = update.loss(random_batch(system), g(update.name)).value
        loss.backward()
        assert loss.isfinite()
        network = system.networks()[update.network]
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None), update.name
        network.zero_grad(set_to_none=True)


@every_system
def test_samples(name: str) -> None:
    """They are like the last field that is taken, and follow the draws, or what is given where nothing is drawn."""
    system = tiny_system(name)
    batches = [random_batch(system, 3, seed if system.given else 1) for seed in (1, 1, 2)]
    with sampling_mode(system):
        images, same, other = (system.sample_for(b, g("sample", s)) for b, s in zip(batches, (1, 1, 2), strict=True))
    assert images.shape == (3, *system.sample_shape)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not images.requires_grad, "sample under torch.no_grad()"
    assert torch.equal(images, same)
    assert not torch.equal(images, other)


@every_system
def test_samples_stay_in_bounds_when_weights_are_large(name: str) -> None:
    """Those of an untrained network are near 0 whether something bounds them or not."""
    system = tiny_system(name)
    with torch.no_grad():
        for p in (p for key in system.sampled_networks for p in system.networks()[key].parameters()):
            p.mul_(10)
    with sampling_mode(system):
        images = system.sample_for(random_batch(system, 3), g("sample"))
    assert images.isfinite().all()
    assert images.abs().max() <= 1


@every_system
def test_generate_is_sample_without_the_draws(name: str) -> None:
    """Systems of latents alone: `sample` is `generate` of standard normal latents, drawn in their order."""
    system = tiny_system(name)
    if not system.latent_shapes:
        with pytest.raises(NotImplementedError):
            system.generate({}, torch.zeros(1, dtype=torch.int64))
        return
    labels, draws = torch.arange(3) % system.config.classes, g("sample", 1)
    latents = {k: torch.randn(3, *shape, generator=draws) for k, shape in system.latent_shapes.items()}
    with sampling_mode(system), torch.no_grad():
        images = system.generate(latents, labels)
        drawn = system.sample(labels, g("sample", 1))
    assert images.dtype == drawn.dtype
    assert images.shape == drawn.shape
    assert images.abs().max() <= 1
    assert torch.equal(images, drawn) != system.draws_pixels


@every_system
def test_what_is_saved_is_all_there_is(name: str) -> None:
    """After training a little: a fresh system with the kept state draws the same images and takes the same losses."""
    system = tiny_system(name)
    clock = Clock(0, 0)
    for i in range(3):
        for update in system.updates(clock):
            only(system, update)
            begin_update(system.networks().values())
            update.loss(random_batch(system, 4, i), g(update.name, i)).value.backward()
            end_update(system.networks().values())
            with torch.no_grad():
                for p in system.networks()[update.network].parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=1e-3)
                        p.grad = None
        clock = Clock(clock.nimg + 8, clock.iteration + 1)
        system.after_iteration(clock)
    fresh = tiny_system(name, seed=9)
    for key, network in fresh.networks().items():
        network.load_state_dict(copy.deepcopy(system.networks()[key].state_dict()))
    fresh.load_state_dict(copy.deepcopy(system.state_dict()))
    found: list[list[Tensor]] = []
    for each in (system, fresh):
        losses: list[Tensor] = []
        for update in each.updates(clock):
            only(each, update)
            losses.append(update.loss(random_batch(each), g(update.name)).value.detach())
        with sampling_mode(each):
            found.append([*losses, each.sample_for(random_batch(each, 2), g("sample"))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_system
def test_can_be_watched_for_collapse(name: str) -> None:
    """Outputs of translations are compared over their inputs, other samples within pairs of a class."""
    system, workers = tiny_system(name), Workers(rank=0, size=1, device=torch.device("cpu"))
    watch = CollapseWatch(GuardsSpec(), system, workers, lambda *_, **__: None)
    batches = [random_batch(system, 4, index) for index in range(2)]
    watch.look(batches, [0, 1], 3, Clock(0, 0))
    assert all(math.isfinite(value) for value in watch.readings.values())
    if not system.given:
        return
    with sampling_mode(system):
        drawn = [system.sample_for(b, generator("cpu", 3, "diversity", 0, i)) for i, b in enumerate(batches)]
    sums = [
        sum(class_distances(x, b.labels) for x, b in zip(side, batches, strict=True))
        for side in (drawn, [b[system.sample_field] for b in batches])
    ]
    expected = (sums[0][0] / sums[0][1]) / (sums[1][0] / sums[1][1])
    assert watch.readings["collapse/diversity"] == pytest.approx(expected.item(), rel=1e-6)
    watch.look([random_batch(system, 1)], [0], 3, Clock(1, 1))  # batches of one image have no pairs
    assert "collapse/diversity" not in watch.readings


@every_system
def test_has_a_job_file_that_can_be_planned(name: str) -> None:
    jobs = [job for job in JOBS if job.system.name == name]
    assert jobs, f"jobs/: no job file trains {name}; add one"
    smallest = min(jobs, key=lambda job: not job.system.preset.startswith("tiny"))
    plan, _ = plan_job(smallest, target("h200", smallest))
    assert plan.total > 0
    assert all(update.flops > 0 for update in plan.updates)


def test_a_system_that_draws_from_the_global_generator_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite itself."""
    draw: Callable[..., Tensor] = get("biggan").sample
    monkeypatch.setattr(get("biggan"), "sample", lambda *a, **k: draw(*a, **k) + torch.rand(1))
    with pytest.raises(AssertionError):
        test_nothing_is_drawn_from_the_global_generator("biggan")
