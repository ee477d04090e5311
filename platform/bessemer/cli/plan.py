"""`bessemer plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bessemer.training.plan import Plan

__all__ = ["plan"]


def plan(
    job: Annotated[Path, typer.Argument(help="Job file (YAML); `bessemer schema` documents its fields.")],
    workers: Annotated[int | None, typer.Option(help="Workers; by default those of the job.")] = None,
    device: Annotated[str, typer.Option(help="Device of each worker: h200, h100, a100, v100 or cpu.")] = "cpu",
    efficiency: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the device's peak to assume for matrix products.")
    ] = 0.35,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set training.slice_size=8. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a job takes before it runs: memory per worker, bytes sent, operations, images per second.

    Nothing is allocated or trained: any job can be planned for any device on any machine. Exits with 2 when the device
    cannot hold the job.
    """
    from bessemer.cli.output import echo_json
    from bessemer.orchestration.planning import plan_job
    from bessemer.spec.load import load_job
    from bessemer.training.plan import check_fits, target

    spec = load_job(job, [*(set_ or ()), *([f"resources.workers={workers}"] if workers is not None else [])])
    on = target(device, spec)
    made, notes = plan_job(spec, on, efficiency)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        echo_json(made.as_dict())
    else:
        _print(made)
    check_fits(made, spec, lambda changed: plan_job(changed, on)[0])


def _print(made: Plan) -> None:
    from bessemer.cli.output import human_bytes, table

    typer.secho(
        f"{made.job}: {made.workers} worker(s), each on {made.device}, ZeRO {made.zero_stage}, {made.precision}\n",
        bold=True,
    )
    table(
        ("MEMORY OF A WORKER", "BYTES", "SHARE"),
        [
            (name, human_bytes(size), f"{size / made.total:.1%}")
            for name, size in [*made.parts.items(), ("total", made.total)]
        ],
    )
    worst = "an evaluation" if made.worst == "evaluation" else f"update {made.worst}"
    if made.host:
        typer.echo(f"and {human_bytes(made.host)} in the host's memory, where the optimizer is")
    if made.memory is not None:
        typer.echo(f"{human_bytes(made.memory)} are there; the worst moment is in {worst}")
    typer.echo()
    table(
        (
            "UPDATE",
            "NETWORK",
            "STEPS PER ITERATION",
            "SECOND ORDER",
            "TFLOP",
            "SECONDS",
            "MOST OF THEM",
            "SENT",
            "NEEDS",
        ),
        [
            (
                u.name,
                u.network,
                float(u.steps),
                "yes" if u.second_order else "no",
                u.flops / 1e12,
                u.seconds,
                u.limit,
                human_bytes(u.sent),
                human_bytes(u.memory),
            )
            for u in made.updates
        ],
    )
    typer.echo(
        f"\nAn iteration of {made.images} images: {made.flops / 1e12:.4g} TFLOP, {human_bytes(made.sent)} sent by each "
        f"worker.\nExpected: {made.img_per_s:.4g} img/s, {made.hours:.3g} hours to the end, matrix products at "
        f"{made.efficiency:g} (assumed) of {made.workers} x {made.peak / 1e12:.3g} TFLOP/s, without evaluations and "
        "waiting for others."
    )
