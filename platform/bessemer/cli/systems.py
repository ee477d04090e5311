"""`bessemer systems`: the generative systems, their presets and their numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bessemer.systems.contract import System

__all__ = ["app"]

app = typer.Typer(help="The generative systems: which there are, and what each is made of.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback(invoke_without_command=True)
def _default(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_systems(as_json)


@app.command("list")
def list_systems(as_json: Json = False) -> None:
    """List the generative systems: family, paper, data, metrics and presets; so does `bessemer systems` alone."""
    from bessemer.cli.output import echo_json, table
    from bessemer.systems.registry import all_systems

    systems = all_systems().values()
    if as_json:
        echo_json(
            [
                {
                    "name": s.name,
                    "family": s.family,
                    "modality": s.modality,
                    "paper": s.paper,
                    "presets": list(s.presets),
                    "metrics": _metrics(s),
                }
                for s in systems
            ]
        )
        return
    rows = []
    for s in systems:
        own = ", ".join(_own_metrics(s))
        found = re.search(r"(arXiv|doi):[^\s;,]+", s.paper)
        paper = found.group() if found else ""
        rows.append((s.name, s.family, s.modality, paper, own or "samples", ", ".join(s.presets)))
    table(("SYSTEM", "FAMILY", "DATA", "PAPER", "METRICS", "PRESETS"), rows)


def _own_metrics(system: type[System]) -> list[str]:
    """Metrics that not every system has: of its likelihood, or of targets."""
    from bessemer.evaluation.names import LIKELIHOODS, TARGETS
    from bessemer.systems.likelihood import LikelihoodSystem

    likelihoods = LIKELIHOODS if issubclass(system, LikelihoodSystem) else ()
    return [*likelihoods, *(TARGETS if "targets" in system.takes else ())]


def _metrics(system: type[System]) -> list[str]:
    """Names of the metrics that evaluate a system: its own, and those of samples, which evaluate all."""
    from bessemer.evaluation.names import METRICS

    return [*_own_metrics(system), *METRICS]


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the system, as `bessemer systems` lists it.")],
    preset: Annotated[str | None, typer.Option(help="Preset. Default: the system's first.")] = None,
    as_json: Json = False,
) -> None:
    """Show one system: paper, configuration, size of each network, updates, optimizers, metrics.

    Nothing is allocated: even the largest preset takes a moment on any machine.
    """
    import torch

    from bessemer.cli.output import echo_json
    from bessemer.systems.registry import build, get

    preset = preset or next(iter(get(name).presets))
    with torch.device("meta"):
        system = build(name, preset)
    facts = _describe(system, preset)
    if as_json:
        echo_json(facts)
    else:
        _print(facts)


def _describe(system: System, preset: str) -> dict[str, Any]:
    from dataclasses import asdict

    networks = {
        name: {
            "parameters": sum(p.numel() for p in network.parameters()),
            "buffers": sum(b.numel() for b in network.buffers()),
        }
        for name, network in system.networks().items()
    }
    updates = [
        {
            "name": update.name,
            "network": update.network,
            "repeats": update.repeats,
            "interval": update.interval,
            "second_order": update.second_order,
        }
        for update in {u.name: u for u in system.every_update()}.values()
    ]
    return {
        "name": system.name,
        "family": system.family,
        "paper": system.paper,
        "preset": preset,
        "presets": list(system.presets),
        "config": system.config.model_dump(mode="json"),
        "networks": networks,
        "sampled_networks": list(system.sampled_networks),
        "updates": updates,
        "optimizers": {name: asdict(defaults) for name, defaults in system.optimizers().items()},
        "stages": [{"name": stage.name, "kimg": stage.kimg} for stage in system.stages()[:-1]]
        + [{"name": system.stages()[-1].name, "kimg": None}],
        "metrics": _metrics(type(system)),
    }


def _print(facts: dict[str, Any]) -> None:
    from bessemer.cli.output import table
    from bessemer.evaluation.names import METRICS, describe_comparisons

    typer.secho(f"{facts['name']} ({facts['family']}), preset {facts['preset']}", bold=True)
    typer.echo(facts["paper"])
    typer.echo(f"Presets: {', '.join(facts['presets'])}\n")
    table(
        ("NETWORK", "PARAMETERS", "OPTIMIZER", "SAMPLED"),
        [
            (
                name,
                f"{sizes['parameters']:,}",
                _optimizer(facts["optimizers"][name]),
                "yes" if name in facts["sampled_networks"] else "no",
            )
            for name, sizes in facts["networks"].items()
        ],
    )
    typer.echo()
    table(
        ("UPDATE", "NETWORK", "STEPS PER ITERATION", "EVERY", "SECOND ORDER"),
        [
            (u["name"], u["network"], u["repeats"], u["interval"], "yes" if u["second_order"] else "no")
            for u in facts["updates"]
        ],
    )
    if len(facts["stages"]) > 1:
        typer.echo()
        lengths = [(s["name"], "to the end" if s["kimg"] is None else f"{s['kimg']:g}") for s in facts["stages"]]
        table(("STAGE", "KIMG"), lengths)
    typer.echo()
    table(("FIELD", "VALUE"), [(k, _value(v)) for k, v in facts["config"].items()])
    own = [name for name in facts["metrics"] if name not in METRICS]
    typer.echo(f"\nMetrics: {', '.join([*own, describe_comparisons()])}")


def _value(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _optimizer(o: dict[str, Any]) -> str:
    betas = f" betas {o['betas'][0]:g}, {o['betas'][1]:g}" if o["name"] in ("adam", "adamax") else ""
    decay = f" weight decay {o['weight_decay']:g}" if o["weight_decay"] else ""
    return f"{o['name']} lr {o['lr']:g}{betas} eps {o['eps']:g}{decay}"
