"""`bessemer register`: a run's weights in MLflow's model registry."""

from __future__ import annotations

from typing import Annotated

import typer

from bessemer.cli.locate import RunArgument, run_directory

__all__ = ["register"]


def register(
    run: RunArgument,
    model: Annotated[str | None, typer.Option(help="Name of the registered model. Default: that of the job.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the versions as JSON.")] = False,
) -> None:
    """Put the newest and the best snapshot of a run into MLflow's model registry: safetensors, JSON and a model card.

    MLflow's `latest` is then the newest; `best` moves only to what one protocol measured as better than the version
    that has it. What MLflow lacks of the run is sent first. Again and again changes nothing.
    """
    from dataclasses import asdict

    from bessemer.cli.output import echo_json
    from bessemer.tracking.mlflow_mirror import register_run

    entries = register_run(run_directory(run), model)
    if json:
        echo_json([asdict(entry) for entry in entries])
        return
    for entry in entries:
        named = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
        typer.echo(f"{entry.model} version {entry.version}: {entry.snapshot}{named}")
    if entries[0].note:
        typer.echo(f"best stays where it is: {entries[0].note}", err=True)
