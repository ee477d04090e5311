"""What an engine does to gradients, rates and precision, alike at every stage and number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.training.plain import ITERATIONS, SEED, SHAPES, SLICE, PlainLoop
from torch import Tensor

from bessemer.training.rng import generator

BATCH = 4 * SLICE
Results = dict[int, list[dict[str, Tensor]]]
everywhere = pytest.mark.parametrize(("workers", "stage"), [(w, s) for w in (1, 2) for s in (0, 1, 2, 3)])
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(run_script: object) -> Results:
    return {workers: run_script("features_run.py", workers) for workers in (1, 2)}  # type: ignore[operator]


def check(results: Results, setting: str, workers: int, stage: int, wanted: dict[str, Tensor], atol: float) -> None:
    for rank, state in enumerate(results[workers]):
        for name, value in wanted.items():
            if not name.startswith("grad_norm/"):
                error = (state[f"{setting}/{stage}/{name}"] - value).abs().max().item()
                assert error <= atol, f"rank {rank}, {name}: differs by {error}"


class Plain(PlainLoop):
    """The variational autoencoder by hand, with a step of its own."""

    def __init__(self, step: Callable[[Plain, list[Tensor], list[Tensor]], None], bad: int = -1) -> None:
        super().__init__("vae", 4, "adam")
        self.own_step, self.bad, self.steps = step, bad, 0

    def step(self, name: str, loss: Tensor) -> None:
        parameters = list(self.p[name].values())
        gradients = list(torch.autograd.grad(loss, parameters))
        if self.steps == self.bad:
            gradients = [g * float("nan") for g in gradients]
        with torch.no_grad():
            self.own_step(self, parameters, gradients)
        self.steps += 1

    def adam(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        self.optimizers["vae"].step()


def run_of(step: Callable[[Plain, list[Tensor], list[Tensor]], None], bad: int = -1) -> dict[str, Tensor]:
    return Plain(step, bad).run()


offloaded = pytest.mark.parametrize(("workers", "stage"), [(w, s) for w in (1, 2) for s in (1, 2, 3)])


@offloaded
def test_offloaded_steps_are_the_same(results: Results, workers: int, stage: int) -> None:
    """What DeepSpeed does on the way to the host's memory; that it is the host's, test_offload.py says on a GPU."""
    check(results, "offload", workers, stage, run_of(Plain.adam), 1e-6)
    for setting in ("nan at 2", "lamb"):
        for state in results[workers]:
            prefix = f"{setting}/{stage}/"
            names = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
            assert f"{prefix}vae.decoder.2.bias" in state
            for name in names:
                found = state[f"{setting}, offload/{stage}/{name}"]
                torch.testing.assert_close(found, state[prefix + name], rtol=0, atol=1e-6)


@offloaded
def test_an_offloaded_restart_changes_no_bit(results: Results, workers: int, stage: int) -> None:
    for state in results[workers]:
        names = [k.removeprefix(f"offload/{stage}/") for k in state if k.startswith(f"offload/{stage}/vae.")]
        assert names
        for name in names:
            assert torch.equal(state[f"offload/{stage}/{name}"], state[f"offload, resumed/{stage}/{name}"]), name


@everywhere
@pytest.mark.parametrize("bad", [0, 2])
def test_a_step_with_a_nan_is_skipped(results: Results, bad: int, workers: int, stage: int) -> None:
    def skip(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        if all(g.isfinite().all() for g in gradients):
            loop.adam(parameters, gradients)

    setting = f"nan at {bad}"
    check(results, setting, workers, stage, run_of(skip, bad), 1e-6)
    assert [float(s[f"{setting}/{stage}/skipped"]) for s in results[workers]] == [1] * workers


@everywhere
def test_sanitizing_steps_on(results: Results, workers: int, stage: int) -> None:
    def sanitize(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        loop.adam(parameters, [g.nan_to_num(nan=0, posinf=1e5, neginf=-1e5) for g in gradients])

    wanted = run_of(sanitize, 2)
    check(results, "nan at 2, sanitized", workers, stage, wanted, 1e-6)
    skipped = results[workers][0][f"nan at 2/{stage}/vae.decoder.2.bias"]
    assert (wanted["vae.decoder.2.bias"] - skipped).abs().max() > 1e-4  # the momentum moved the weights


@everywhere
def test_clipping(results: Results, workers: int, stage: int) -> None:
    def clip(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.5, "the bound must matter"
        loop.adam(parameters, [g * 0.5 / norm for g in gradients])

    check(results, "clip", workers, stage, run_of(clip), 1e-6)


def cosine(step: int) -> float:
    """Cosine decay from the end of the warm-up, one and a half steps, to a tenth."""
    progress = (step - 1.5) / (ITERATIONS - 1.5)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * max(progress, 0))) / 2


@everywhere
def test_learning_rate_follows_the_image_clock(results: Results, workers: int, stage: int) -> None:
    def schedule(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        factor = 1 / 1.5 if loop.steps == 0 else cosine(loop.steps)
        loop.optimizers["vae"].param_groups[0]["lr"] = 2e-3 * 2 * factor  # sqrt(16 / 4)
        loop.adam(parameters, gradients)

    check(results, "schedule", workers, stage, run_of(schedule), 1e-6)


@everywhere
def test_the_journal_holds_norm_and_rate(results: Results, workers: int, stage: int) -> None:
    norms: list[Tensor] = []

    def measure(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        factor = 1 / 1.5 if loop.steps == 0 else cosine(loop.steps)
        loop.optimizers["vae"].param_groups[0]["lr"] = 2e-3 * 2 * factor
        loop.adam(parameters, gradients)

    run_of(measure)
    for state in results[workers]:
        prefix = f"schedule/{stage}/journal/"
        values = {k.removeprefix(prefix): float(v) for k, v in state.items() if k.startswith(prefix)}
        assert values.keys() == {"grad_norm/vae", "lr/vae"}
        assert values["grad_norm/vae"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)
        assert values["lr/vae"] == pytest.approx(2e-3 * 2 * cosine(ITERATIONS - 1))
        prefix = f"fp16/{stage}/journal/"
        values = {k.removeprefix(prefix): float(v) for k, v in state.items() if k.startswith(prefix)}
        assert values["loss_scale/vae"] == float(state[f"fp16/{stage}/scale"])
        assert values["skipped_steps/vae"] == float(state[f"fp16/{stage}/skipped"])
        assert math.isfinite(values["grad_norm/vae"])  # of the steps that were taken


@everywhere
def test_lamb_is_the_papers_algorithm(results: Results, workers: int, stage: int) -> None:
    m: dict[int, Tensor] = {}
    v: dict[int, Tensor] = {}

    def lamb(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        t = loop.steps + 1
        for i, (x, g) in enumerate(zip(parameters, gradients, strict=True)):
            m[i] = 0.5 * m.get(i, torch.zeros_like(x)) + 0.5 * g
            v[i] = 0.9 * v.get(i, torch.zeros_like(x)) + 0.1 * g**2
            r = (m[i] / (1 - 0.5**t)) / ((v[i] / (1 - 0.9**t)).sqrt() + 1e-4)
            u = r + 0.1 * x
            x -= 0.02 * x.norm() / u.norm() * u

    check(results, "lamb", workers, stage, run_of(lamb), 1e-6)


@everywhere
def test_lars_is_the_papers_algorithm(results: Results, workers: int, stage: int) -> None:
    v: dict[int, Tensor] = {}

    def lars(loop: Plain, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for i, (w, g) in enumerate(zip(parameters, gradients, strict=True)):
            rate = 0.02 * w.norm() / (g.norm() + 0.01 * w.norm())
            v[i] = 0.9 * v.get(i, torch.zeros_like(w)) + 2.0 * rate * (g + 0.01 * w)
            w -= v[i]

    check(results, "lars", workers, stage, run_of(lars), 1e-6)


def half_precision_loop(dtype: torch.dtype, scaled: bool) -> tuple[dict[str, Tensor], float, int]:
    """torch's own GradScaler around slices in half precision; weights, final scale and the number of overflows."""
    draws = generator("cpu", SEED, "init")
    p = {k: torch.randn(s, generator=draws).mul(0.3).requires_grad_() for k, s in SHAPES["vae"].items()}
    optimizer = torch.optim.Adam(p.values(), 2e-3, (0.5, 0.9), 1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    halved = 0
    for iteration in range(20 if scaled else ITERATIONS):
        for i in range(4):
            nimg = iteration * BATCH
            x = torch.randn(SLICE, 12, generator=generator("cpu", SEED, "data", nimg, i))
            with torch.autocast("cpu", dtype):
                h = torch.tanh(torch.nn.functional.linear(x, p["encoder.0.weight"], p["encoder.0.bias"]))
                code = torch.nn.functional.linear(h, p["encoder.2.weight"], p["encoder.2.bias"])
                mean, log_var = code.chunk(2, dim=1)
                noise = torch.randn(mean.shape, generator=generator("cpu", SEED, "vae", nimg, i))
                z = mean + (log_var / 2).exp() * noise
                h = torch.tanh(torch.nn.functional.linear(z, p["decoder.0.weight"], p["decoder.0.bias"]))
                y = torch.nn.functional.linear(h, p["decoder.2.weight"], p["decoder.2.bias"])
                kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
                loss = ((y - x).square().sum(1) + kl).mean()
            scaler.scale(loss / 4).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        halved += scaler.get_scale() < before
        optimizer.zero_grad()
    return {f"vae.{k}": t.detach() for k, t in p.items()}, scaler.get_scale(), halved


@everywhere
def test_half_precision_is_that_of_torch(results: Results, workers: int, stage: int) -> None:
    wanted, scale, halved = half_precision_loop(torch.float16, scaled=True)
    assert 0 < halved < 15, "the scale must overflow, and then find its place, for this test to say anything"
    check(results, "fp16", workers, stage, wanted, 1e-6)
    for state in results[workers]:
        assert float(state[f"fp16/{stage}/scale"]) == scale
        assert float(state[f"fp16/{stage}/skipped"]) == halved


@everywhere
def test_brain_float_is_that_of_torch(results: Results, workers: int, stage: int) -> None:
    check(results, "bf16", workers, stage, half_precision_loop(torch.bfloat16, scaled=False)[0], 1e-6)


@everywhere
@pytest.mark.parametrize("setting", ["lamb", "lars", "schedule", "fp16"])
def test_a_restart_changes_no_bit(results: Results, setting: str, workers: int, stage: int) -> None:
    """Moments of large-batch optimizers, the place in the schedule and the loss scale."""
    for state in results[workers]:
        straight, resumed = f"{setting}/{stage}/", f"{setting}, resumed/{stage}/"
        names = [k.removeprefix(straight) for k in state if k.startswith(f"{straight}vae.")]
        for name in [*names, *(["scale"] if setting == "fp16" else [])]:
            assert torch.equal(state[straight + name], state[resumed + name]), name


@everywhere
def test_nothing_asked_for(results: Results, workers: int, stage: int) -> None:
    """The script itself restored this run at all stages, and compared."""
    check(results, "plain", workers, stage, run_of(Plain.adam), 1e-6)


@everywhere
def test_memory_layout_changes_nothing(results: Results, workers: int, stage: int) -> None:
    check(results, "channels last", workers, stage, run_of(Plain.adam), 1e-6)


def normalised_loop(workers: int) -> dict[str, Tensor]:
    """The network with batch normalisation over groups of slices, by hand."""
    draws = generator("cpu", SEED, "init")
    shapes = {"a.weight": (16, 12), "norm.gain": (16,), "norm.bias": (16,), "b.weight": (12, 16), "b.bias": (12,)}
    p = {k: torch.randn(s, generator=draws).mul(0.3).requires_grad_() for k, s in shapes.items()}
    optimizer = torch.optim.Adam(p.values(), 2e-3, (0.5, 0.9), 1e-4)
    running_mean, running_var = torch.zeros(16), torch.ones(16)
    for iteration in range(ITERATIONS):
        losses, means, variances = [], [], []
        for group in range(0, 4, workers):
            draws_of = [generator("cpu", SEED, "data", iteration * BATCH, i) for i in range(group, group + workers)]
            x = torch.cat([torch.randn(SLICE, 12, generator=g) for g in draws_of]).requires_grad_()
            h = x @ p["a.weight"].T
            normed = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * p["norm.gain"] + p["norm.bias"]
            y = torch.tanh(normed) @ p["b.weight"].T + p["b.bias"]
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            losses.append((y - x).square().mean() + 0.01 * slope.square().mean())
            means.append(h.mean(0).detach())
            variances.append(h.var(0).detach())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        running_mean = running_mean.lerp(torch.stack(means).mean(0), 0.1)
        running_var = running_var.lerp(torch.stack(variances).mean(0), 0.1)
    out = {k: t.detach() for k, t in p.items()} | {"norm.running_mean": running_mean, "norm.running_var": running_var}
    return {f"vae.{k}": t for k, t in out.items()}


@pytest.mark.parametrize(("workers", "stage"), [(w, s) for w in (1, 2) for s in (0, 1, 2)])
def test_statistics_across_workers(results: Results, workers: int, stage: int) -> None:
    """Second derivatives included; with two workers other weights come out than with one, as the spec says."""
    check(results, "shared statistics", workers, stage, normalised_loop(workers), 1e-6)
    assert (normalised_loop(2)["vae.a.weight"] - normalised_loop(1)["vae.a.weight"]).abs().max() > 1e-4


def test_a_compiled_network_trains_alike(results: Results) -> None:
    assert results[1][0]["compile/1/graphs"] >= 2
    check(results, "compile", 1, 1, PlainLoop("hinge", 4, "adam").run(), 1e-6)
